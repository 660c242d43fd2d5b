"""Fields that say what the text must be: the grammar that the engine gets, and refusals."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from engine.request import Grammar
from server.text import grammars
from server.text.tokens.tokenizer import Tokenizer
from tests.server.openai.test_refusals import error_of
from tests.support.servers.http_server import CHAT_PATH, COMPLETION_PATH, MODEL, Server

PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
TAG = {
    "structures": [{"begin": "<f>", "schema": PERSON, "end": "</f>"}],
    "triggers": ["<f"],
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": PERSON}}
BODIES: dict[str, Any] = {CHAT_PATH: {"messages": [{"role": "user", "content": "hi"}]},
                          COMPLETION_PATH: {"prompt": "hi"}}  # fmt: skip


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Server]:
    """One for all tests, so that its process starts once."""
    server = Server(tokenizer)
    yield server
    server.context.grammars.close()


def sent(server: Server, path: str = CHAT_PATH, **fields: Any) -> Grammar | None:
    response = server.post(path, {"model": MODEL} | BODIES[path] | fields)
    assert response.status_code == 200, response.text
    return server.engine.submitted[-1].params.grammar


def refused(server: Server, **fields: Any) -> dict[str, Any]:
    before = len(server.engine.submitted)
    error: dict[str, Any] = error_of(server.chat(**fields), 400)
    assert len(server.engine.submitted) == before
    return error


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("fields", "kind", "part"),
    [
        ({"response_format": FORMAT}, "json_schema", json.dumps(PERSON)),
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {"response_format": {"type": "json_object", "schema": PERSON}},
            "json_schema",
            json.dumps(PERSON),
        ),
        ({"response_format": {"type": "structural_tag", **TAG}}, "lark", '"<f"'),
        ({"structured_outputs": {"json": PERSON}}, "json_schema", json.dumps(PERSON)),
        ({"structured_outputs": {"json": json.dumps(PERSON)}}, "json_schema", json.dumps(PERSON)),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"regex": "a+b"}}, "regex", "a+b"),
        ({"structured_outputs": {"choice": ["a b", 'c"']}}, "lark", 'start: "a b" | "c\\""'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"structured_outputs": {"grammar": 'root ::= "a" [0-9]+'}}, "lark", 'start: "a" /[0-9]/+'),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, "lark", '"</f>"'),
        ({"guided_json": PERSON}, "json_schema", json.dumps(PERSON)),
        ({"guided_regex": "[0-9]{3}"}, "regex", "[0-9]{3}"),
        ({"guided_choice": ["yes", "no"]}, "lark", 'start: "yes" | "no"'),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
        ({"regex": "[0-9]{3}"}, "regex", "[0-9]{3}"),
        ({"ebnf": 'root ::= "a" [0-9]+'}, "lark", 'start: "a" /[0-9]/+'),
    ],
)
def test_every_form_gives_the_engine_a_grammar(
    server: Server, path: str, fields: dict[str, Any], kind: str, part: str
) -> None:
    grammar = sent(server, path, **fields)
    assert grammar is not None
    assert grammar.kind == kind
    assert part in grammar.text


@pytest.mark.parametrize(
    "fields", [{}, {"response_format": {"type": "text"}}, {"response_format": None}]
)
def test_without_such_a_field_there_is_no_grammar(server: Server, fields: dict[str, Any]) -> None:
    assert sent(server, **fields) is None


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


WIDE = {str(number): {} for number in range(1025)}
IN_FORMAT = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": "text"}, "response_format", "must be an object"),
        (of_schema({"x-guidance": {"lenient": True}}), IN_FORMAT, '"x-guidance" is not supported'),
        ({"guided_json": {"x-guidance": {}}}, "guided_json", '"x-guidance" is not supported'),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "is missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            IN_FORMAT,
            "is missing",
        ),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
            "response_format.json_schema",
            "only allowed with",
        ),
        (of_schema({"not": {}}), IN_FORMAT, 'keyword "not" is not supported; supported are type'),
        (of_schema({"format": "zip", "type": "string"}), IN_FORMAT, '"zip" is not supported'),
        (of_schema({"enum": []}), IN_FORMAT, "empty"),
        (
            of_schema({"oneOf": [{"type": "string"}, {"minLength": 2}]}),
            IN_FORMAT,
            "oneOf needs schemas that exclude each other",
        ),
        (of_schema({"$ref": "#"}), IN_FORMAT, '"$ref" "#" leads back to itself'),
        (
            of_schema(
                {
                    "properties": {"a": {"$ref": "#/$defs/a~1"}},
                    "$defs": {
                        "a/": {"anyOf": [{"$ref": "#/$defs/b"}]},
                        "b": {"$ref": "#/$defs/a~1"},
                    },
                }
            ),
            IN_FORMAT,
            "leads back to itself",
        ),
        (of_schema({"$ref": "https://example.com/a"}), IN_FORMAT, "registry"),
        (of_schema({"a": "x" * 2**17}), IN_FORMAT, "at most 131072 characters"),
        ({"structured_outputs": {}}, "structured_outputs", "needs one of"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs",
            "needs one",
        ),
        (
            {"structured_outputs": {"json_object": 1}},
            "structured_outputs.json_object",
            "must be true",
        ),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": 0}},
            "structured_outputs.disable_any_whitespace",
            "must be false",
        ),
        ({"structured_outputs": {"regex": "a(?=b)"}}, "structured_outputs.regex", "look-around"),
        ({"structured_outputs": {"regex": "a" * 5000}}, "structured_outputs.regex", "4096"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "JSON of an object"),
        ({"guided_json": "[" * 9999 + "]" * 9999}, "guided_json", "nested too deep"),
        ({"guided_json": '{"a":' * 70 + "1" + "}" * 70}, "guided_json", "nested too deeply"),
        ({"guided_json": json.dumps(WIDE)}, "guided_json", "at most 1024 members"),
        ({"guided_json": '{"type": "null", "type": "object"}'}, "type", "occurs twice"),
        ({"guided_json": '{"const": NaN}'}, "guided_json", "NaN is no JSON"),
        (
            {"structured_outputs": {"structural_tag": json.dumps(WIDE)}},
            "structured_outputs.structural_tag",
            "at most 1024 members",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"grammar": "start: b"}}, "structured_outputs.grammar", "b"),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag",
            "is missing",
        ),
        (
            {"structured_outputs": {"whitespace_pattern": " *"}},
            "structured_outputs.whitespace_pattern",
            "not supported",
        ),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "not allowed with"),
        ({"response_format": FORMAT, "guided_regex": "a"}, "guided_regex", "not allowed with"),
        (
            {"response_format": {"type": "structural_tag", **TAG, "triggers": ["<g"]}},
            "response_format",
            "must begin with",
        ),
    ],
)
def test_what_cannot_be_done_is_a_400_that_says_why(
    server: Server, fields: dict[str, Any], param: str, words: str
) -> None:
    error = refused(server, **fields)
    assert error["param"] == param
    assert words in error["message"]
    assert len(error["message"]) < 800


def test_text_that_is_not_unicode_is_refused(server: Server) -> None:
    body = json.dumps({"model": MODEL, **BODIES[CHAT_PATH], "guided_regex": "\ud800"})
    error = error_of(server.post_raw(CHAT_PATH, body.encode()), 400)
    assert error["param"] in ("guided_regex", None)


def test_a_grammar_that_ends_its_process_is_refused_and_the_next_is_not(server: Server) -> None:
    sent(server, guided_regex="a")
    checker = server.context.grammars
    with checker._children.one() as child:
        child._process.send_signal(signal.SIGPROF)  # as its own alarm
        with pytest.raises((EOFError, BrokenPipeError)):
            child.ask(Grammar("regex", "b"))
    assert sent(server, guided_regex="c") == Grammar("regex", "c")


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGPROF, grammars.TOO_COMPLEX), (signal.SIGKILL, None)]
)
def test_a_process_that_others_kill_is_not_the_fault_of_the_grammar(
    server: Server, number: signal.Signals, error: str | None
) -> None:
    """The system kills processes when memory is short."""
    sent(server, guided_regex="a")
    checker = server.context.grammars
    with checker._children.one() as child:
        pass
    send = child._send

    def send_and_kill(message: msgspec.Struct) -> None:
        child._process.send_signal(signal.SIGSTOP)  # it has no time to answer
        send(message)
        child._process.send_signal(number)
        child._process.send_signal(signal.SIGCONT)

    child._send = send_and_kill  # type: ignore[method-assign]
    assert checker._asked(Grammar("regex", f"b{number.value}")).error == error


def test_what_was_checked_once_needs_no_process(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent(server, guided_regex="known")
    monkeypatch.setattr(grammars.GrammarChecker, "_asked", None)
    assert sent(server, guided_regex="known") == Grammar("regex", "known")
