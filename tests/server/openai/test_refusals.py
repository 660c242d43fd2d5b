"""What is refused, and with which message. Nothing of it reaches the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, get_type_hints

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from server.openai.request.fields import HARMLESS
from server.openai.request.schema import ChatRequest, CompletionRequest
from tests.support.servers.http_server import (
    CHAT,
    CHAT_PATH,
    COMPLETION_PATH,
    MESSAGES,
    MODEL,
    Server,
)

MakeServer = Callable[..., Server]
BIG = 10**40


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response; asserts the format of all errors."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert response.headers["x-request-id"]
    return dict(error)


BAD_SAMPLING: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 1000),
    ("n", True),
    ("n", "1"),
    ("n", 1.5),
    ("temperature", -1),
    ("temperature", 2.5),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", [1]),
    ("top_p", -0.1),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 0.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", 0.009),
    ("repetition_penalty", 10.1),
    ("logit_bias", {"384": 1}),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"5": None}),
    ("logit_bias", {str(index): 1 for index in range(1025)}),
    ("logit_bias", [1]),
    ("seed", 2**64),
    ("seed", -(2**63) - 1),
    ("seed", 1.5),
    ("stop", ["a"] * 33),
    ("logit_bias", {"5": 1, "05": 1}),
    ("truncate_prompt_tokens", -2),
    ("use_beam_search", True),
    ("use_beam_search", 0),
    ("length_penalty", 2),
    ("stop", "a" * 1025),
    ("stop", [1]),
    ("stop_token_ids", [384]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["1"]),
    ("logprob_token_ids", []),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [5, 384]),
    ("bad_words", [""]),
    ("bad_words", "word"),
    ("logprob_token_ids", "5"),
    ("logprob_token_ids", list(range(129))),
    ("max_tokens", -1),
    ("max_tokens", BIG),
    ("max_tokens", "5"),
    ("max_tokens", 5.5),
    ("min_tokens", -1),
    ("min_tokens", 65),
    ("priority", BIG),
    ("ignore_eos", 1),
    ("skip_special_tokens", "yes"),
    ("include_stop_str_in_output", 0),
    ("stream", 1),
    ("stream", "true"),
    ("stream_options", {"include_usage": True}),
    ("speculation", True),
    ("speculation", []),
    ("speculation", "off"),
    ("user", 5),
    ("model", 5),
    ("model", None),
]
BAD_CHAT: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_completion_tokens", 0),
    ("logprobs", 1),
    ("top_logprobs", 3),
    ("logprob_token_ids", [5]),
    ("top_logprobs", 21),
    ("messages", []),
    ("messages", "hi"),
    ("messages", None),
    ("messages[0].role", [{"role": "function", "content": "a"}]),
    ("messages[0].role", [{"role": 5, "content": "a"}]),
    ("messages[0].role", [{"content": "a"}]),
    ("messages[0].content", [{"role": "user"}]),
    ("messages[0].content", [{"role": "user", "content": 5}]),
    ("messages[0].content", [{"role": "user", "content": []}]),
    ("messages[0].content", [{"role": "user", "content": None}]),
    (
        "messages[0].content[0].type",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    ),
    ("messages[0].tool_call_id", [{"role": "tool", "content": "a"}]),
    ("messages[0].tool_calls", [{"role": "assistant", "content": "a", "tool_calls": [{}]}]),
    (
        "messages[0].tool_calls",
        [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}],
    ),
    ("messages[0].extra", [{"role": "user", "content": "a", "extra": 1}]),
    ("messages", ["hi"]),
    ("tools", [{"type": "function"}]),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function"}),
    ("functions", [{}]),
    ("function_call", "x"),
    ("audio", {}),
    ("modalities", ["text", "audio"]),
    ("moderation", {}),
    ("web_search_options", {}),
    ("metadata", [1]),
    ("echo", 1),
    ("store", "yes"),
    ("chat_template_kwargs", []),
]
BAD_COMPLETION: list[tuple[str, Any]] = [
    ("prompt", None),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", [["a"]]),
    ("prompt", [1, "a"]),
    ("prompt", [-1]),
    ("prompt", [384]),
    ("prompt", [[384]]),
    ("prompt", [2**40]),
    ("prompt", [1.5]),
    ("prompt", {"a": 1}),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logprobs", True),
    ("echo", "yes"),
    ("best_of", 0),
    ("best_of", 21),
    ("suffix", "a"),
]


def refused(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    error = error_of(server.post(path, body), 400)
    assert error["type"] == "invalid_request_error"
    assert server.engine.submitted == []
    assert server.context.admission.num_waiting == 0
    return error


@pytest.mark.parametrize(("param", "value"), BAD_SAMPLING + BAD_CHAT)
def test_bad_chat_fields_are_400_naming_the_field(server: Server, param: str, value: Any) -> None:
    field = param.partition("[")[0]
    error = refused(server, CHAT_PATH, CHAT | {field: value})
    assert error["param"].startswith(param)
    assert param.rpartition(".")[2] in error["message"]


@pytest.mark.parametrize(("param", "value"), BAD_SAMPLING + BAD_COMPLETION)
def test_bad_completion_fields_are_400_naming_the_field(
    server: Server, param: str, value: Any
) -> None:
    error = refused(server, COMPLETION_PATH, {"model": MODEL, "prompt": "hi"} | {param: value})
    assert error["param"].startswith(param)
    assert param in error["message"]


@pytest.mark.parametrize("prompt", [["a", 1], [1, "a"], [[1], 2], [1, [2]], ["a", [1]], [1, None]])
def test_mixed_prompts_are_refused_with_a_clear_message(server: Server, prompt: list[Any]) -> None:
    error = refused(server, COMPLETION_PATH, {"model": MODEL, "prompt": prompt})
    assert error["param"] == "prompt"
    assert error["message"] == (
        "prompt is an array of 2: all elements must be of one kind: strings, token ids, or lists "
        "of token ids"
    )


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"a"',
        b"null",
        b"{} x",
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": -Infinity}',
        b'{"user": "\xff\xfe"}',
        b'{"user": "\\ud800"}',
        b'{"user": "\\udc00\\ud800"}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"user": ' + b"[" * 999 + b"]" * 999 + b"}",
    ],
)
def test_bodies_that_are_no_json_object_are_400(server: Server, path: str, body: bytes) -> None:
    error = error_of(server.post_raw(path, body), 400)
    assert error["code"] == "invalid_json"
    assert server.engine.submitted == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", "1e999"), ("metadata", '{"a": [-1e999]}'), ("prompt_cache_options", "1e999")],
)
def test_infinite_numbers_are_400(server: Server, field: str, value: str) -> None:
    body = json.dumps(CHAT)[:-1] + f', "{field}": {value}}}'
    error = error_of(server.post_raw(CHAT_PATH, body.encode()), 400)
    assert error["param"] == field
    assert "finite number" in error["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_other_content_types_are_400(server: Server, kind: str) -> None:
    content = json.dumps(CHAT).encode()
    response = server.request("POST", CHAT_PATH, content=content, headers={"content-type": kind})
    error = error_of(response, 400)
    assert error["code"] == "unsupported_content_type"
    assert error["message"] == f'The content-type is "{kind}": it must be application/json'


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH, "/tokenize", "/detokenize"])
def test_unknown_fields_are_400(server: Server, path: str) -> None:
    error = error_of(server.post(path, {"temprature": 1}), 400)
    assert (error["param"], error["code"]) == ("temprature", "unknown_field")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "messages": MESSAGES},
        {"prompt": 5},
        {"messages": []},
        {"prompt": "a", "add_generation_prompt": True},
    ],
)
def test_bad_tokenize_requests_are_400(server: Server, body: dict[str, Any]) -> None:
    error_of(server.post("/tokenize", body), 400)


@pytest.mark.parametrize("tokens", [None, "a", [384], [-1], [2**40], ["a"], [True]])
def test_bad_detokenize_requests_are_400(server: Server, tokens: Any) -> None:
    assert error_of(server.post("/detokenize", {"tokens": tokens}), 400)["param"].startswith(
        "tokens"
    )


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
@pytest.mark.parametrize("max_tokens", [64, 10**9])
def test_prompt_and_output_beyond_the_context_are_400(
    server: Server, path: str, max_tokens: int
) -> None:
    content = {"messages": MESSAGES} if path == CHAT_PATH else {"prompt": "hi"}
    error = refused(server, path, {"model": MODEL, "max_tokens": max_tokens} | content)
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 64 tokens. However,")
    assert str(max_tokens) in error["message"]
    assert error["param"] == next(iter(content))  # as OpenAI


def test_a_prompt_that_fills_the_context_leaves_no_room_for_output(server: Server) -> None:
    error = error_of(server.complete(prompt=[[5], [5] * 64]), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt[1]")
    assert "has 64 tokens, which leaves no room for an answer. Please" in error["message"]
    assert server.complete(prompt=[5] * 64, max_tokens=0).status_code == 200
    assert server.complete(prompt=[5] * 63).status_code == 200


def test_much_too_long_texts_are_refused_without_tokenising(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(text: str, add_special_tokens: bool = True) -> list[int]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(server.tokenizer, "encode", never)
    text = "a" * (64 * server.tokenizer._widest[0] + 1)
    for response in (
        server.complete(prompt=text),
        server.chat(messages=[{"role": "user", "content": text}]),
        server.post("/tokenize", {"prompt": text}),
    ):
        assert error_of(response, 400)["code"] == "context_length_exceeded"


def test_templates_that_raise_are_400_with_their_message(make_server: MakeServer) -> None:
    server = make_server(template="{{ raise_exception('roles must alternate') }}")
    error = error_of(server.chat(), 400)
    assert "roles must alternate" in error["message"]
    assert server.context.admission.num_waiting == 0


def test_models_without_a_template_say_so(make_server: MakeServer) -> None:
    assert "/v1/completions" in error_of(make_server(template=None).chat(), 400)["message"]


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
def test_unknown_models_are_404(server: Server, path: str) -> None:
    content = {"messages": MESSAGES} if path == CHAT_PATH else {"prompt": "hi"}
    error = error_of(server.post(path, {"model": "gpt", **content}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error_of(server.get("/v1/models/a/b"), 404)["code"] == "model_not_found"


def test_unknown_routes_and_methods_have_the_same_format(server: Server) -> None:
    assert error_of(server.get("/nowhere"), 404)["code"] == "not_found"
    response = server.get(CHAT_PATH)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/models", "GET, HEAD"),
        ("/v1/responses/resp_1", "DELETE, GET"),
        ("/v1/responses/resp_1/cancel", "POST"),
        ("/v1/responses/input_tokens", "POST"),
        ("/admin/learning", "GET, POST"),
        ("/ping", "GET, HEAD, POST"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
def test_all_methods_of_a_path_are_named(make_server: MakeServer, path: str, methods: str) -> None:
    server = make_server(admin_keys=("root",))
    key = {"authorization": "Bearer root"}
    response = server.run(lambda client: client.request("PUT", path, headers=key))
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == methods


def test_wide_objects_are_refused_by_their_width(server: Server) -> None:
    wide = {f"k{index}": 0 for index in range(2000)}
    for body in (CHAT | {"metadata": wide}, CHAT | {"messages": [wide]}, wide):
        error_of(server.post(CHAT_PATH, body), 400)


HONOURED = {
    "frequency_penalty", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens",
    "messages", "model", "n", "presence_penalty", "response_format", "seed", "stop", "stream",
    "stream_options", "temperature", "top_logprobs", "top_p", "prompt", "echo",
    "tools", "tool_choice", "parallel_tool_calls", "prediction", "best_of", "prompt_cache_key",
}  # fmt: skip
ONLY_ONE_VALUE = {"modalities"}


@pytest.mark.parametrize(
    ("model", "published", "bad"),
    [
        (
            ChatRequest,
            chat_create_params.CompletionCreateParamsNonStreaming,
            dict(BAD_SAMPLING + BAD_CHAT),
        ),
        (
            CompletionRequest,
            completion_create_params.CompletionCreateParamsNonStreaming,
            dict(BAD_SAMPLING + BAD_COMPLETION),
        ),
    ],
)
def test_every_published_field_is_honoured_documented_or_refused(
    model: Any, published: Any, bad: dict[str, Any]
) -> None:
    properties = model.model_json_schema()["properties"]
    for name in get_type_hints(published):
        harmless = properties[name].get("description", "").startswith(HARMLESS)
        refuses = properties[name].get("description", "").startswith(("Refused", "Only"))
        assert [name in HONOURED, harmless, refuses].count(True) == 1, name
        assert not refuses or name in bad, name
