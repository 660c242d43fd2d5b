"""/v1/messages: what the model is shown, what is answered and what is refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from engine.messages import ErrorCode
from server.text.tokens.tokenizer import Tokenizer
from tests.support.engines.scripted_engine import fail, say
from tests.support.models.tiny_llama import EOS
from tests.support.servers.http_server import MODEL, Server

MakeServer = Callable[..., Server]
PATH = "/v1/messages"
HI = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
F = {"name": "f", "description": "d", "input_schema": SCHEMA}
CALL_TEXT = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "7"}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": ""}
STRICT_NOT = {"name": "g", "input_schema": {"not": {}}, "strict": True}
EPHEMERAL = {"cache_control": {"type": "ephemeral"}}


@pytest.fixture
def make_server(make_server: MakeServer) -> MakeServer:
    return functools.partial(make_server, max_model_len=4096)


@pytest.fixture
def server(make_server: MakeServer) -> Server:
    return make_server()


def ask(server: Server, *messages: Any, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "max_tokens": 99, "messages": list(messages) or [HI]}
    return server.post(PATH, body | fields)


def error_of(response: httpx.Response, status: int) -> tuple[str, str]:
    """Type and message of an error; asserts its form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert (set(body), body["type"]) == ({"type", "error", "request_id"}, "error")
    assert body["request_id"] == response.headers["request-id"]
    assert set(body["error"]) == {"type", "message"}
    return body["error"]["type"], body["error"]["message"]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_a_conversation_is_shown_as_in_chat(server: Server) -> None:
    text = {"type": "text", "text": "hi", **EPHEMERAL}
    messages = [
        {"role": "user", "content": [text, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "so"}, USE]},
        {"role": "user", "content": [RESULT | EPHEMERAL, {"type": "text", "text": "go"}]},
    ]
    reply = ask(server, *messages, system=[{"type": "text", "text": "s"}])
    assert reply.headers["x-aerie-warning"].startswith("not used: messages[0].content[0].cache")
    plain = server.chat(
        messages=[
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}] * 2},
            {
                "role": "assistant",
                "content": "so",
                "tool_calls": [{"id": "t1", "function": {"name": "f", "arguments": {"a": 1}}}],
            },
            {"role": "tool", "tool_call_id": "t1", "content": "7"},
            {"role": "user", "content": "go"},
        ],
        max_tokens=99,
    )
    assert plain.status_code == 200
    first, second = server.engine.submitted
    assert first.prompt_ids == second.prompt_ids
    body = {"model": MODEL, "messages": messages, "system": "s"}
    counted = server.post(f"{PATH}/count_tokens", body).json()
    assert counted == {"input_tokens": len(first.prompt_ids)}


def test_parameters_reach_the_engine(server: Server) -> None:
    asked = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "seed": 3}
    assert ask(server, **asked).status_code == 200
    params = server.engine.submitted[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.25, 7, 3)
    assert params.max_tokens == 99


def test_the_last_message_of_an_assistant_is_continued(server: Server) -> None:
    assert ask(server, HI, {"role": "assistant", "content": "The"}).status_code == 200
    ids = server.engine.submitted[-1].prompt_ids
    assert server.tokenizer.decode(ids, skip_special_tokens=False).endswith("assistant\nThe")
    for content in ([USE], " "):
        message = error_of(ask(server, HI, {"role": "assistant", "content": content}), 400)[1]
        assert message.startswith("messages[1] is the last message")


ANSWERS: dict[str, tuple[str, dict[str, Any], list[Any], str]] = {
    "text": ("hello", {}, [{"type": "text", "text": "hello", "citations": None}], "end_turn"),
    "nothing": ("", {}, [], "end_turn"),
    "cut": (
        "hello",
        {"max_tokens": 2},
        [{"type": "text", "text": "hel", "citations": None}],
        "max_tokens",
    ),
    "stop sequence": (
        "hello",
        {"stop_sequences": ["ll", "x"]},
        [{"type": "text", "text": "he", "citations": None}],
        "stop_sequence",
    ),
    "call": ("so" + CALL_TEXT, {"tools": [F]}, [
        {"type": "text", "text": "so", "citations": None},
        {"type": "tool_use", "name": "f", "input": {"a": 1}},
    ], "tool_use"),
    "bad arguments": (CALL_TEXT.replace('"a"', "a"), {"tools": [F]}, [
        {"type": "tool_use", "name": "f", "input": {"INVALID_JSON": "{a: 1}"}},
    ], "tool_use"),
    "thought": ("<think>hm</think>so", {}, [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "so", "citations": None},
    ], "end_turn"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "fields", "content", "reason"), ANSWERS.values(), ids=ANSWERS)
def test_whole_and_streamed_messages_say_the_same(
    make_server: MakeServer,
    tokenizer: Tokenizer,
    text: str,
    fields: dict[str, Any],
    content: list[Any],
    reason: str,
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    server = make_server(say([*ids, EOS]), model={"reasoning_parser": "think"})
    whole = ask(server, **fields).json()
    assert without_ids(whole["content"]) == content
    assert whole["stop_reason"] == reason
    assert whole["stop_sequence"] == ("ll" if reason == "stop_sequence" else None)
    found = events(ask(server, stream=True, **fields))
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert found[-2]["delta"]["stop_reason"] == reason
    assert found[-2]["usage"] == whole["usage"]
    usage = found[0]["message"]["usage"]
    assert usage["input_tokens"] == (
        whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"]
    )
    assert joined(found[2:-2]) == content


def joined(found: list[dict[str, Any]]) -> list[Any]:
    """The blocks that a stream adds up to."""
    blocks: list[Any] = []
    jsons: list[str] = []
    for event in found:
        assert event["index"] == len(blocks) - (event["type"] != "content_block_start")
        match event["type"]:
            case "content_block_start":
                blocks.append(event["content_block"])
                jsons.append("")
            case "content_block_delta":
                for name, value in event["delta"].items():
                    if name == "partial_json":
                        jsons[-1] += value
                    elif name != "type":
                        blocks[-1][name] += value
            case _:
                assert event["type"] == "content_block_stop"
                if jsons[-1]:
                    blocks[-1]["input"] = parsed(jsons[-1])
    return without_ids(blocks)


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"INVALID_JSON": text}


def without_ids(blocks: list[Any]) -> list[Any]:
    return [{name: value for name, value in block.items() if name != "id"} for block in blocks]


def test_too_many_tokens_for_the_context_are_cut_and_told(make_server: MakeServer) -> None:
    server = make_server(max_model_len=24)
    assert ask(server, max_tokens=10**6).json()["stop_reason"] == "model_context_window_exceeded"
    for limit in (1, 5, 10**6):
        long = {"role": "user", "content": "hi" * 30}
        message = error_of(ask(server, long, max_tokens=limit), 400)[1]
        assert "maximum context length is 24 tokens" in message
        assert "completion" not in message


CHOICES: list[tuple[dict[str, Any], bool, bool]] = [
    ({"type": "auto"}, False, True),
    ({"type": "any"}, True, True),
    ({"type": "tool", "name": "f"}, True, True),
    ({"type": "none"}, False, False),
]


@pytest.mark.parametrize(("choice", "is_forced", "is_shown"), CHOICES)
def test_tool_choices_are_those_of_chat(
    server: Server, choice: dict[str, Any], is_forced: bool, is_shown: bool
) -> None:
    assert ask(server, tools=[F], tool_choice=choice).status_code == 200
    request = server.engine.submitted[-1]
    shown = server.tokenizer.decode(request.prompt_ids)
    assert (request.params.grammar is not None, '"name": "f"' in shown) == (is_forced, is_shown)
    server.context.grammars.close()


def test_output_can_be_made_to_fit_a_schema(server: Server) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    assert ask(server, output_config={"format": form}).status_code == 200
    grammar = server.engine.submitted[-1].params.grammar
    assert grammar is not None
    assert json.loads(grammar.text) == SCHEMA
    server.context.grammars.close()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens is null: it must be an integer"),
    ({"max_tokens": 0}, "max_tokens is 0: it must be at least 1"),
    ({"messages": []}, "messages is an array of 0: it must have at least 1 entry"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 'messages[0].role is "tool": it must be'),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        'messages[0].content[0].type is "image": it must be "text"',
    ),
    (
        {"messages": [{"role": "user", "content": [USE]}]},
        'content[0].type is "tool_use": with the role user it must be text or tool_result',
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        'text is missing: the type "text" needs it',
    ),
    (
        {"messages": [{"role": "user", "content": [RESULT]}], "system": "s"},
        'messages[0].content[0].tool_use_id is "t1": it must be the id of a call',
    ),
    (
        {"messages": [HI, {"role": "assistant", "content": [THOUGHT, USE, USE]}, HI]},
        'messages[1].content[2].id is "t1": another call of this message has this id',
    ),
    (
        {"tools": [F, STRICT_NOT], "tool_choice": {"type": "any"}},
        'tools[1].input_schema is an object: of the function "g": the keyword "not"',
    ),
    ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, 'tools[0].type is "web_search_202'),
    ({"tools": [F, F]}, 'tools[1].name is "f": another function has this name'),
    ({"tool_choice": {"type": "any"}}, "tool_choice is only allowed with tools"),
    ({"tools": [F], "tool_choice": {"type": "tool"}}, "tool_choice.name is required"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
     'output_config.format.schema is an object: the keyword "not" is not supported'),
    ({"speculation": {"trace": True}}, "speculation.trace is true: it must be false"),
    ({"container": "c"}, "container is \"c\": not supported"),
    ({"nonsense": 1}, 'Unknown field "nonsense"'),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_what_cannot_be_done_is_a_400_that_names_the_field(
    server: Server, fields: dict[str, Any], words: str
) -> None:
    kind, message = error_of(ask(server, **fields), 400)
    assert (kind, words in message) == ("invalid_request_error", True), message
    assert server.engine.submitted == []
    server.context.grammars.close()


def test_every_error_has_the_form_of_the_api(make_server: MakeServer) -> None:
    server = make_server(api_keys=("key",), root_path="/llm", max_body_bytes=200)
    key = {"x-api-key": "key", "anthropic-version": "2023-06-01", "anthropic-beta": "b"}
    body = {"model": MODEL, "max_tokens": 9, "messages": [HI]}
    for path in (PATH, f"/llm{PATH}"):
        assert server.post(f"{path}?beta=true", body, headers=key).status_code == 200
        assert error_of(server.post(path, body), 401)[0] == "authentication_error"
    wrong = error_of(server.post(PATH, body, headers={"x-api-key": "no"}), 401)
    assert wrong[0] == "authentication_error"
    assert error_of(server.post(f"{PATH}?x=1", body, headers=key), 400)[1].startswith("Unknown que")
    other = server.post(PATH, body | {"model": "other"}, headers=key)
    assert error_of(other, 404)[0] == "not_found_error"
    assert error_of(server.get(PATH, headers=key), 405)[0] == "invalid_request_error"
    large = server.post(PATH, body | {"system": "x" * 200}, headers=key)
    assert error_of(large, 413)[0] == "request_too_large"
    server.engine.info = None
    assert error_of(server.post(PATH, body, headers=key), 503)[0] == "overloaded_error"
    assert "error" in server.post("/v1/chat/completions", {}).json(), "others keep their own"


def test_a_failure_after_the_first_event_is_an_event(make_server: MakeServer) -> None:
    server = make_server(fail([*b"ab"], "secret"))
    found = events(ask(server, stream=True))
    assert found[-1]["error"]["type"] == "api_error"
    assert "secret" not in str(found)
    server.engine.script = fail([], "too long", ErrorCode.CONTEXT_LENGTH)
    assert error_of(ask(server, stream=True), 400) == ("invalid_request_error", "too long")
    server.engine.script = fail([], "gone", ErrorCode.STOPPING)
    assert error_of(ask(server), 503)[0] == "overloaded_error"
