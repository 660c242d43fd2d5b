"""Tools of chat requests: what is refused, what the model is told, how its calls are answered."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from engine.grammar.compiler import GrammarCompiler
from engine.request import Grammar
from server.openai.inputs.tool_grammar import call_grammar, strict_grammar
from server.openai.request.tools import Tool
from server.text.answer.forms import SYNTAXES
from server.text.answer.instructions import INSTRUCTIONS
from server.text.tokens.tokenizer import Tokenizer
from tests.server.openai.test_refusals import error_of
from tests.support.engines.scripted_engine import INFO, say
from tests.support.models.tiny_llama import CHAT_TEMPLATE
from tests.support.servers.http_server import MESSAGES, Server, events_of

MakeServer = Callable[..., Server]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
F = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
G = {"type": "function", "function": {"name": "g"}}
CALL_F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
CALL_G = CALL_F.replace('"f"', '"g"')
NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.fixture
def make_server(make_server: MakeServer) -> MakeServer:
    """Makes servers with room for tools."""
    return functools.partial(make_server, max_model_len=4096)


@pytest.fixture
def server(make_server: MakeServer) -> Iterator[Server]:
    server = make_server()
    yield server
    server.context.grammars.close()


def allowed(*names: str, mode: str = "auto") -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "custom"}]}, "tools[0].type", '"custom": it must be "function"'),
    ({"tools": [function(name="a b")]}, "tools[0].function.name", "it must match"),
    ({"tools": [function(name="")]}, "tools[0].function.name", "at least 1 character"),
    ({"tools": [function(name="a" * 129)]}, "tools[0].function.name", "at most 128 characters"),
    ({"tools": [F, G, F]}, "tools", 'tools[2].function.name is "f": another function has'),
    ({"tools": [F] * 129}, "tools", "at most 128 entries"),
    ({"tools": [function(parameters=[])]}, "tools[0].function.parameters", "be an object"),
    (
        {"tools": [function(parameters={"type": "string"})]},
        "tools[0].function.parameters",
        'its "type" is "string": it must be "object"',
    ),
    (
        {"tools": [function(parameters={"required": [1]})]},
        "tools[0].function.parameters",
        'its "required" is an array of 1: it must be an array of strings',
    ),
    ({"tools": [function(strict=1)]}, "tools[0].function.strict", "be true or false"),
    ({"tools": [F], "tool_choice": "any"}, "tool_choice", '"none", "auto" or "required"'),
    ({"tool_choice": "required"}, "tool_choice", "only allowed with tools"),
    (
        {"tools": [F], "tool_choice": function(name="h")},
        "tool_choice",
        'names the function "h": it must be one of tools: "f"',
    ),
    ({"tools": [F], "tool_choice": allowed("g")}, "tool_choice", 'names the function "g"'),
    (
        {"tools": [F], "tool_choice": {"type": "function"}},
        "tool_choice.function",
        'tool_choice.function is required with the type "function"',
    ),
    (
        {"tools": [F], "tool_choice": "required", "response_format": {"type": "json_object"}},
        "tool_choice",
        'with response_format only "auto" and "none" are',
    ),
    ({"tools": [F], "guided_regex": "a"}, "tools", "not allowed with guided_regex"),
    ({"functions": [{"name": "f"}]}, "functions", "send them as tools"),
    ({"function_call": {"name": "f"}}, "function_call", "send tools and tool_choice"),
    (
        {"tools": [F], "chat_template_kwargs": {"tools": []}},
        "chat_template_kwargs",
        "must not hold tools",
    ),
    (
        {"messages": [*MESSAGES, {"role": "tool", "tool_call_id": "c", "content": "1"}]},
        "messages[1].tool_call_id",
        'is "c": it must be the id of a call in the assistant message before it: there is none',
    ),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_what_cannot_be_called_is_refused(
    server: Server, fields: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(server.chat(**fields), 400)
    assert (error["param"], message in error["message"]) == (param, True), error


def test_the_result_of_another_call_is_refused(server: Server) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}]
    result = {"role": "tool", "content": "1", "tool_call_id": "c1"}
    assert server.chat(messages=[*asked, result, result]).status_code == 200
    late = [*asked, result, *MESSAGES, result]
    assert error_of(server.chat(messages=late), 400)["param"] == "messages[4].tool_call_id"
    call["id"] = "c2"
    message = error_of(server.chat(messages=[*asked, result]), 400)["message"]
    assert message.endswith('message before it: "c2"')
    del call["id"]
    assert server.chat(messages=[*asked, result]).status_code == 200, "it is not known whose it is"


def test_two_calls_of_one_id_are_refused(server: Server) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = [*MESSAGES, {"role": "assistant", "tool_calls": [call, call]}]
    error = error_of(server.chat(messages=asked), 400)
    assert error["param"] == "messages[1].tool_calls[1].id"
    assert 'is "c1": another call' in error["message"]
    del call["id"]
    assert server.chat(messages=asked).status_code == 200


def test_tools_are_refused_where_the_operator_wants_none(make_server: MakeServer) -> None:
    server = make_server(model={"tool_parser": "none"})
    error = error_of(server.chat(tools=[F]), 400)
    assert error["message"] == "tools is an array of 1: this server's model.tool_parser is none"
    assert server.chat(tools=[F], tool_choice="none").status_code == 200


def prompt_of(server: Server, **fields: Any) -> str:
    response = server.post("/tokenize", {"messages": MESSAGES} | fields)
    assert response.status_code == 200, response.text
    return server.tokenizer.decode(response.json()["tokens"], False)


SHOWS_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}:"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{{ m.tool_call_id }};{% endfor %}"
)


def test_a_template_gets_the_tools_in_one_form(make_server: MakeServer) -> None:
    server = make_server(template=SHOWS_TOOLS)
    mixed = {
        "function": {"parameters": SCHEMA, "name": "f", "description": "d"},
        "type": "function",
    }
    assert prompt_of(server, tools=[mixed | {"cache_control": {}}]) == f"{json.dumps([F])}user:hi;"
    empty = {"name": "g", "parameters": {"type": "object", "properties": {}}}
    shown = json.dumps([{"type": "function", "function": empty}])
    assert prompt_of(server, tools=[G]) == f"{shown}user:hi;"
    assert prompt_of(server) == "user:hi;"


@pytest.mark.parametrize(
    ("choice", "names"),
    [("auto", "fg"), ("none", ""), (None, "fg"), (allowed("g"), "g"), (allowed("g", "f"), "fg")],
)
def test_only_tools_that_may_be_called_are_shown(
    make_server: MakeServer, choice: Any, names: str
) -> None:
    server = make_server(template="{{ tools | map(attribute='function.name') | join if tools }}.")
    assert server.chat(tools=[F, G], tool_choice=choice).status_code == 200
    assert server.tokenizer.decode(server.engine.submitted[0].prompt_ids) == f"{names}."


def test_other_templates_get_instructions_in_the_system_message(server: Server) -> None:
    empty = json.dumps({"name": "g", "parameters": {"type": "object", "properties": {}}})
    example = CALL_F.replace('"f"', '"function_name"').replace(
        '{"a": 1}', '{"argument_name": "value"}'
    )
    text = INSTRUCTIONS.format(
        tools=f'{json.dumps(F)}\n{{"type": "function", "function": {empty}}}', example=example
    )
    user = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    prompt = prompt_of(server, tools=[F, G])
    assert prompt == f"<|im_start|>system\n{text}<|im_end|>\n{user}"
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    prompt = prompt_of(server, tools=[F, G], messages=[system, *MESSAGES])
    assert prompt == f"<|im_start|>system\nBe brief.\n{text}<|im_end|>\n{user}"
    system["content"] = "Be brief."  # type: ignore[assignment]
    prompt = prompt_of(server, tools=[F, G], messages=[system, *MESSAGES])
    assert prompt == f"<|im_start|>system\nBe brief.\n\n{text}<|im_end|>\n{user}"


HISTORY = [
    *MESSAGES,
    {
        "role": "assistant",
        "content": "Well.",
        "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "c", "content": "42"},
]


def test_other_templates_show_calls_as_the_model_writes_them(make_server: MakeServer) -> None:
    prompt = prompt_of(make_server(), messages=HISTORY)
    assert f"assistant\nWell.\n{CALL_F}<|im_end|>\n<|im_start|>tool\n42<|im_end|>" in prompt
    narrow = make_server(
        template="{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] %}"
        "{{ raise_exception('no') }}{% endif %}{{ m.role }}:{{ m.content }};{% endfor %}"
    )
    prompt = prompt_of(narrow, messages=HISTORY)
    assert prompt.endswith("user:<tool_response>\n42\n</tool_response>;")


def test_special_tokens_in_tools_are_letters(make_server: MakeServer) -> None:
    server = make_server(template=SHOWS_TOOLS, specials_in_content=("<|im_end|>",))
    tool = function(description="a<|im_end|>", parameters={"properties": {"<|im_end|>": {}}})
    tokens = server.post("/tokenize", {"messages": MESSAGES, "tools": [tool]}).json()["tokens"]
    assert 2 not in tokens
    assert server.tokenizer.decode(tokens).count("<|im_end|>") == 2


def answered(server: Server, text: str, **fields: Any) -> tuple[Any, Any]:
    """The choice of a reply, and the same from a stream, as the SDK adds it up."""
    script = say([*server.ids(text), 2], step=fields.pop("step", 3))
    server.engine.script = script
    fields = {"tools": [F, G]} | fields
    if "max_tokens" in fields:
        fields["max_tokens"] = len(server.ids(text))
    reply = server.chat(**fields)
    assert reply.status_code == 200, reply.text
    whole = ChatCompletion.model_validate(reply.json(), strict=True).choices[0]
    state = ChatCompletionStreamState(input_tools=openai.omit, response_format=openai.omit)
    for chunk in events_of(server.chat(stream=True, **fields))[:-1]:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk, strict=True))
    return whole, state.current_completion_snapshot.choices[0]


ANSWERS: list[tuple[str, dict[str, Any], Any, list[Any], str]] = [
    (CALL_F, {}, None, [("f", '{"a": 1}')], "tool_calls"),
    (f"So:\n{CALL_F}\n{CALL_G}", {}, "So:", [("f", '{"a": 1}'), ("g", '{"a": 1}')], "tool_calls"),
    ("Hello", {}, "Hello", [], "stop"),
    (CALL_F.replace("f", "h", 1), {}, CALL_F.replace("f", "h", 1), [], "stop"),
    (CALL_F + CALL_G, {"parallel_tool_calls": False}, None, [("f", '{"a": 1}')], "tool_calls"),
    (CALL_F, {"tool_choice": allowed("g")}, CALL_F, [], "stop"),
    (CALL_F, {"tool_choice": "none"}, CALL_F, [], "stop"),
    (CALL_F, {"stop": "}"}, None, [("f", '{"a": 1')], "stop"),
    (CALL_F, {"stop": "\n</"}, None, [("f", '{"a": 1}')], "tool_calls"),
    (CALL_F[:-16], {"max_tokens": ...}, None, [("f", '{"a": ')], "length"),
    (f"So:\n{CALL_F[:20]}", {"max_tokens": ...}, "So:", [], "length"),
]  # fmt: skip


@pytest.mark.parametrize("step", [1, 5, 99])
@pytest.mark.parametrize(("text", "fields", "content", "calls", "reason"), ANSWERS)
def test_calls_are_answered_alike_whole_and_streamed(
    server: Server,
    text: str,
    fields: dict[str, Any],
    content: str | None,
    calls: list[Any],
    reason: str,
    step: int,
) -> None:
    whole, streamed = answered(server, text, step=step, logprobs=True, **fields)
    assert (whole.message.content, whole.finish_reason) == (content, reason)
    assert (streamed.message.content or None, streamed.finish_reason) == (content, reason)
    for choice in (whole, streamed):
        found = choice.message.tool_calls or []
        assert [(call.function.name, call.function.arguments) for call in found] == calls
        assert all(call.type == "function" and call.id.startswith("call_") for call in found)
        assert len({call.id for call in found}) == len(found)
    assert streamed.logprobs.content == whole.logprobs.content


THOUGHT = "<think>\nWhy?\n</think>\n\nSo."


def test_reasoning_is_told_from_content_and_counted(make_server: MakeServer) -> None:
    server = make_server(model={"reasoning_parser": "think"})
    whole, streamed = answered(server, THOUGHT, tools=None)
    for message in (whole.message, streamed.message):
        assert (message.content, message.model_extra["reasoning_content"]) == ("So.", "Why?")
    usage = server.chat().json()["usage"]["completion_tokens_details"]
    assert usage["reasoning_tokens"] == len(server.ids(THOUGHT.partition("\n\nSo")[0]))
    called, _ = answered(server, THOUGHT.replace("So.", CALL_F))
    assert (called.message.content, called.finish_reason) == (None, "tool_calls")
    assert called.message.model_extra["reasoning_content"] == "Why?"
    for answer in answered(server, THOUGHT, tools=None, include_reasoning=False):
        assert answer.message.content == "So."
        assert (answer.message.model_extra or {}).get("reasoning_content") is None
    plain, _ = answered(make_server(), THOUGHT)
    assert plain.message.content == THOUGHT


def test_a_prompt_may_open_the_reasoning(make_server: MakeServer) -> None:
    server = make_server(template="{{ messages[0].content }}<think>\n")
    whole, _ = answered(server, "Why? </think>So.", tools=None)
    assert (whole.message.content, whole.message.model_extra["reasoning_content"]) == (
        "So.",
        "Why?",
    )


def test_choices_call_each_for_itself(server: Server) -> None:
    server.engine.script = say([*server.ids(CALL_F), 2])
    choices = server.chat(tools=[F], n=2).json()["choices"]
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in choices}
    assert len(ids) == 2


def test_the_first_delta_of_a_call_has_its_name_and_the_others_its_arguments(
    server: Server,
) -> None:
    server.engine.script = say([*server.ids(CALL_F + CALL_G), 2])
    chunks = events_of(server.chat(tools=[F, G], stream=True))[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    for index, name in enumerate("fg"):
        first, *others = (call for call in calls if call["index"] == index)
        assert first.pop("id").startswith("call_")
        assert first == {
            "index": index,
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        assert all(set(call) == {"index", "function"} for call in others)
        arguments = [call["function"] for call in others]
        assert "".join(each.pop("arguments") for each in arguments) == '{"a": 1}'
        assert not any(arguments)
    assert [delta for delta in deltas if "tool_calls" not in delta] == [
        {"role": "assistant", "content": ""},
        {},
    ]


def test_an_answer_ends_at_its_last_call(server: Server) -> None:
    for step in (1, 999):
        server.engine.script = say(server.ids(CALL_F * 3), step, ends=False)
        reply = server.chat(tools=[F], parallel_tool_calls=False).json()
        used = len(server.ids(CALL_F.partition("\n</")[0]))
        assert reply["usage"]["completion_tokens"] == used
        assert server.engine.aborted == [server.engine.submitted[-1].request_id]
        server.engine.aborted.clear()


PYTHONIC = "{{ tools }}[func_name1(param1=value1)]"
JSON_CALL = '{"name": "f", "parameters": {"a": 1}}'


@pytest.mark.parametrize(
    ("template", "form", "written"),
    [(CHAT_TEMPLATE, "hermes", CALL_F), (PYTHONIC, "llama4_pythonic", "[f(a=1)]")],
)
def test_a_grammar_ensures_calls_that_must_come(
    make_server: MakeServer, template: str, form: str, written: str
) -> None:
    server = make_server(template=template)
    syntax, tools = SYNTAXES[form], [Tool.model_validate(tool) for tool in (F, G)]
    for choice, most, of, reason in (
        ("required", None, tools, "tool_calls"),
        (NAMED, 1, tools[:1], "stop"),
        (allowed("f", mode="required"), None, tools[:1], "tool_calls"),
    ):
        whole, streamed = answered(server, written, tool_choice=choice)
        assert whole.finish_reason == streamed.finish_reason == reason
        assert whole.message.tool_calls[0].function.arguments == '{"a": 1}'
        grammar = server.engine.submitted[-1].params.grammar
        assert grammar == Grammar("lark", call_grammar(syntax, of, most))
    json_object = {"type": "json_object"}
    whole, _ = answered(server, '{"b": 2}', response_format=json_object)
    assert (whole.message.content, whole.finish_reason) == ('{"b": 2}', "stop")
    either = call_grammar(syntax, tools, None, {"type": "object"})
    assert server.engine.submitted[-1].params.grammar == Grammar("lark", either)
    server.context.grammars.close()


def test_a_strict_function_must_have_a_schema_that_can_be_ensured(server: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    for strict in (False, True):
        asked = function(name="h", parameters=schema, strict=strict)
        response = server.chat(tools=[F, asked, G], tool_choice="required")
        assert response.status_code == (400 if strict else 200), response.text
    error = error_of(response, 400)
    assert error["param"] == "tools[1].function.parameters"
    assert 'is an object: of the function "h": the keyword "not" is not' in error["message"]
    endless = {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}}
    asked = {"tools": [F, function(parameters=endless, name="h")], "tool_choice": "required"}
    error = error_of(server.chat(**asked), 400)
    assert error["param"] == "tools[1].function.parameters"
    assert 'of the function "h": its "$ref" "#/properties/a" leads back' in error["message"]


def test_a_strict_function_that_may_be_called_is_ensured(make_server: MakeServer) -> None:
    strict = function(parameters=SCHEMA, strict=True)
    for form in ("hermes", "llama3_json"):
        server = make_server(model={"tool_parser": form})
        whole, _ = answered(server, "Hello", tools=[strict, G])
        assert whole.message.content == "Hello"
        expected = strict_grammar(SYNTAXES[form], [Tool.model_validate(strict)], {})
        assert server.engine.submitted[-1].params.grammar == Grammar("lark", expected)
        assert server.chat(tools=[F, G]).status_code == 200
        assert server.engine.submitted[-1].params.grammar is None
        server.context.grammars.close()
    server = make_server(model={"tool_parser": "llama4_pythonic"})
    odd = {"type": "object", "properties": {"a": {"$ref": "#"}}}
    for parameters, ensured in ((SCHEMA, True), (odd, False)):
        h = {"type": "function", "function": {"name": "h", "parameters": parameters}}
        assert server.chat(tools=[strict, h]).status_code == 200
        assert (server.engine.submitted[-1].params.grammar is not None) is ensured
    server.context.grammars.close()


FREE: dict[str, list[tuple[str, bool]]] = {
    "hermes": [
        ("So: {1} < b", True),
        (f"So:\n{CALL_F}\n{CALL_G}", True),
        (CALL_G.replace("1", '"1"'), True),
        (f"{CALL_F} and {CALL_F.replace('1', 'true')}", False),
        (CALL_F.replace("\n", ""), True),
        (CALL_F.replace('"a"', '"b"'), False),
        (CALL_F[:40], False),
        ('<tool_call>{"name": "f"}', False),
        (JSON_CALL.replace("1", '"1"'), True),
    ],
    "llama3_json": [
        ("So: {1}", True),
        (JSON_CALL, True),
        (f"<|python_tag|>{JSON_CALL}; {JSON_CALL}", True),
        (f"Well:\n {JSON_CALL.replace('1', 'null')}", False),
        (f"{JSON_CALL}; {JSON_CALL.replace('1', 'null')}", False),
        (JSON_CALL.replace(": ", ":").replace("parameters", "arguments"), True),
        (f'{{"type": "function", {JSON_CALL[1:].replace("1", "null")}', False),
        (f"<|python_tag|>{JSON_CALL.replace('1', 'null')}", False),
        (f"as in {JSON_CALL.replace('1', 'null')}", True),
        (JSON_CALL.replace('"f"', '"fg"').replace("1", "null"), True),
    ],
    "llama4_pythonic": [
        ("So: [1] and [f]", True),
        ("[f(a=1)]", True),
        ("Well:\n[ f(a=1), f(a=22)] so", True),
        ("[f(a='1')]", False),
        ("[f(a=1)", False),
        ("[f()]", False),
        ("<|python_start|>[f(a=1)]<|python_end|>", True),
        ("<|python_start|>[f(a=None)]", False),
        ("as in [f(a=None)]", True),
        ("[fg(a=None)]", True),
    ],
}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("form", FREE)
def test_strict_arguments_fit_and_other_text_is_free(
    tokenizer: Tokenizer, form: str, special: bool
) -> None:
    """Also where the marks are special tokens: here token 0 stands for the first of them."""
    compiler = GrammarCompiler.of(tokenizer.to_json(), INFO.vocab_size, INFO.eos_token_ids)
    syntax = SYNTAXES[form]
    tools = [Tool.model_validate(function(parameters=SCHEMA, strict=True))]
    specials = {syntax.markers[0]: 0} if special else {}
    start = compiler.compile(Grammar("lark", strict_grammar(syntax, tools, specials)))
    for text, fits in FREE[form]:
        ids = []
        for part in re.split(f"({re.escape(syntax.markers[0])})", text):
            is_mark = special and part == syntax.markers[0]
            ids += [0] if is_mark else tokenizer.encode(part, add_special_tokens=False)
        matcher = start.deep_copy()
        assert (matcher.validate_tokens([*ids, 2]) == len(ids) + 1) is fits, text


def test_a_grammar_takes_what_a_model_writes_and_nothing_else(tokenizer: Tokenizer) -> None:
    """Checked with llguidance's own matcher, byte by byte."""
    compiler = GrammarCompiler.of(tokenizer.to_json(), INFO.vocab_size, INFO.eos_token_ids)
    tools = [Tool.model_validate(tool) for tool in (F, G)]
    for form, calls in (("hermes", [CALL_F, CALL_G]), ("llama3_json", [JSON_CALL, JSON_CALL])):
        between = SYNTAXES[form].between
        empty = calls[1].replace('"f"', '"g"').replace('{"a": 1}', "{}")
        for most, text, fits in (
            (1, calls[0], True),
            (1, between.join([calls[0], empty]), False),
            (None, between.join([calls[0], empty, calls[0]]), True),
            (None, calls[0].replace("1", '"1"'), False),
            (None, calls[0].replace('"f"', '"h"'), False),
            (None, "Hello", False),
        ):
            grammar = Grammar("lark", call_grammar(SYNTAXES[form], tools, most))
            ids = [*tokenizer.encode(text, add_special_tokens=False), 2]
            matcher = compiler.compile(grammar)
            assert (matcher.validate_tokens(ids) == len(ids)) is fits, (form, text)


MANY = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "on": {"type": "boolean"},
        "at": {"$ref": "#/$defs/place"},
        "none": {"type": "null"},
    },
    "required": ["on"],
    "$defs": {"place": {"type": "array", "items": {"enum": [1, True, "x\n"]}}},
}
PYTHON_CALLS: list[tuple[str, list[Any] | None]] = [
    ("[f(on=True)]", [{"on": True}]),
    ('[f(city="a/\\"b\\n\\té", on=False), f(on=True, none=None)]',
     [{"city": 'a/"b\n\té', "on": False}, {"on": True, "none": None}]),
    ('[f(on=True, at=[1, true, "x\\n"])]', [{"on": True, "at": [1, True, "x\n"]}]),
    ("[f()]", None),
    ("[f(on=1)]", None),
    ("[f(on=True, city='a')]", None),
    ("[f(at=[2], on=True)]", None),
    ("[g()]", None),
    ("f(on=True)", None),
]  # fmt: skip


def test_calls_in_python_are_ensured_and_read_as_their_values(make_server: MakeServer) -> None:
    server = make_server(model={"tool_parser": "llama4_pythonic"})
    tools = [function(parameters=MANY)]
    assert server.chat(tools=tools, tool_choice="required").status_code == 200
    grammar = server.engine.submitted[-1].params.grammar
    compiler = GrammarCompiler.of(server.tokenizer.to_json(), INFO.vocab_size, INFO.eos_token_ids)
    assert grammar is not None
    start = compiler.compile(grammar)
    for text, values in PYTHON_CALLS:
        ids = [*server.ids(text), 2]
        assert (start.deep_copy().validate_tokens(ids) == len(ids)) is (values is not None), text
        if values is not None:
            server.engine.script = say(ids)
            whole, _ = answered(server, text, tools=tools, tool_choice="required")
            found = [json.loads(call.function.arguments) for call in whole.message.tool_calls or ()]
            assert found == values
    odd = {"type": "object", "properties": {"a": {"$ref": "#"}}}
    assert server.chat(tools=[function(parameters=odd)], tool_choice="required").status_code == 200
    text = server.engine.submitted[-1].params.grammar.text  # type: ignore[union-attr]
    assert '\\"parameters\\": ' in text  # as JSON
    server.context.grammars.close()
