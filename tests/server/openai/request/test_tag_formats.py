"""Structural tags in the form of xgrammar: the texts that they allow, and refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from engine.grammar.compiler import GrammarCompiler
from engine.request import Grammar
from server.openai.request.tag_formats import Holder, lark_of
from server.text.tokens.tokenizer import Tokenizer
from tests.server.openai.test_refusals import error_of
from tests.support.engines.scripted_engine import INFO
from tests.support.servers.http_server import Server

FREE = {"type": "any_text"}
BOOLEAN = {"type": "json_schema", "json_schema": {"type": "boolean"}}


def const(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def tag(begin: str, content: Any, end: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def sequence(*elements: Any) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


def triggered(**flags: bool) -> dict[str, Any]:
    tags = [tag("<f=a>", BOOLEAN, "</f>"), tag("<f=b>", const("x/y"), ["</f>", "</g>"])]
    return {"type": "triggered_tags", "triggers": ["<f"], "tags": tags, **flags}


def separated(**flags: bool) -> dict[str, Any]:
    tags = [tag("[", BOOLEAN, "]"), tag("{", const("c"), "}")]
    return {"type": "tags_with_separator", "tags": tags, "separator": ", ", **flags}


FORMATS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (const('a"b\n'), ['a"b\n'], ["a", "ab"]),
    (BOOLEAN, ["true"], ["1", "truex"]),
    ({"type": "regex", "pattern": "a/[0-9]+"}, ["a/12"], ["a", "a/12b"]),
    (FREE, ["", "any\ntext"], []),
    (sequence(const("a"), BOOLEAN, const(".")), ["atrue."], ["atrue", "true."]),
    (sequence(const("a"), FREE), ["a", "ab\nc"], ["b"]),
    (sequence(FREE, const("END.\n"), BOOLEAN), ["xEND.\ntrue"], ["xEND.\n", "END.x"]),
    (sequence(FREE, tag("<", BOOLEAN, ">"), const("!")), ["a b<true>!"], ["<true>", "<x>!"]),
    ({"type": "or", "elements": [const("a"), BOOLEAN]}, ["a", "false"], ["b", "afalse"]),
    (tag("<think>", FREE, "</think>"), ["<think>a < b\n</think>"], ["<think>", "<think></think>x"]),
    (tag("<", FREE, ""), ["<a>", "<"], ["a"]),
    (
        triggered(),
        ["", "a < b", "x <f=a>true</f> y <f=b>x/y</g>"],
        ["<f", "<f=c>", "<f=a>1</f>", "<f=a>true</f><f=b>x</f>"],
    ),
    (triggered(at_least_one=True), ["a <f=a>true</f> b"], ["", "a"]),
    (triggered(stop_after_first=True), ["", "a", "a<f=a>true</f>"], ["a<f=a>true</f> b"]),
    (
        triggered(at_least_one=True, stop_after_first=True),
        ["<f=b>x/y</f>"],
        ["", "<f=b>x/y</f> "],
    ),
    (separated(), ["", "[true]", "[true], {c}, [false]"], ["[true]{c}", " [true]", "[true], "]),
    (separated(at_least_one=True), ["{c}"], ["", "{}"]),
    (separated(stop_after_first=True), ["", "{c}"], ["{c}, {c}"]),
    (
        sequence(tag("<think>", FREE, "</think>"), triggered(at_least_one=True)),
        ["<think>\nhm\n</think> so <f=a>false</f>"],
        ["so <f=a>false</f>", "<think></think> so"],
    ),
]


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler.of(tokenizer.to_json(), INFO.vocab_size, INFO.eos_token_ids)


@pytest.mark.parametrize(("form", "fitting", "others"), FORMATS)
def test_a_format_allows_its_texts_only(
    tokenizer: Tokenizer,
    compiler: GrammarCompiler,
    form: dict[str, Any],
    fitting: list[str],
    others: list[str],
) -> None:
    grammar = Grammar("lark", lark_of(Holder.model_validate({"format": form}).format))
    start = compiler.compile(grammar)
    for text in [*fitting, *others]:
        ids = [*tokenizer.encode(text, add_special_tokens=False), 2]
        taken = start.deep_copy().validate_tokens(ids) == len(ids)
        assert taken == (text in fitting), text


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Server]:
    server = Server(tokenizer)
    yield server
    server.context.grammars.close()


def test_requests_may_send_a_format(server: Server) -> None:
    body = {"type": "structural_tag", "format": triggered()}
    for fields in (
        {"response_format": body},
        {"structured_outputs": {"structural_tag": body}},
        {"structured_outputs": {"structural_tag": json.dumps(body)}},
    ):
        assert server.chat(**fields).status_code == 200
        expected = lark_of(Holder.model_validate({"format": triggered()}).format)
        assert server.engine.submitted[-1].params.grammar == Grammar("lark", expected)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"type": "xml"}, 'have a type of "const_string", "json_schema"'),
        ({}, "format is an object: it must have a type"),
        (const(""), "at least 1 character"),
        (sequence(), "at least 1"),
        (sequence(FREE, BOOLEAN), "any_text must be followed by const_string or tag"),
        (triggered() | {"triggers": ["<g"]}, 'begins with "<f=a>" must begin with one of'),
        ({"type": "json_schema", "json_schema": {"x-guidance": {}}}, '"x-guidance" is not'),
        ({"type": "json_schema", "json_schema": {"not": {}}}, 'keyword "not" is not supported'),
        ({"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}, "format.style is"),
        ({"type": "regex", "pattern": "a(?=b)"}, "look-around"),
    ],
)
def test_formats_that_cannot_be_done_are_refused(
    server: Server, form: dict[str, Any], words: str
) -> None:
    error = error_of(server.chat(response_format={"type": "structural_tag", "format": form}), 400)
    assert error["param"] == "response_format"
    assert words in error["message"]
