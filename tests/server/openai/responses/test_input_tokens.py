"""/v1/responses/input_tokens counts what /v1/responses counts, and refuses what that refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_type_hints

import httpx
import pytest
from openai.types.responses import input_token_count_params
from openai.types.responses.input_token_count_response import InputTokenCountResponse

from server.openai.responses.request import InputTokensRequest, ResponsesRequest
from tests.server.openai.responses.test_responses import CALL, PATH, REFUSED, RESULT, F, ask
from tests.server.openai.test_refusals import error_of
from tests.support.servers.http_server import MODEL, Server

MakeServer = Callable[..., Server]
COUNT_PATH = f"{PATH}/input_tokens"
PAIR = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CHOSEN = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.fixture
def make_server(make_server: MakeServer) -> MakeServer:
    return functools.partial(make_server, max_model_len=4096)


@pytest.fixture
def server(make_server: MakeServer) -> Server:
    return make_server()


def count(server: Server, input: Any = "hi", **fields: Any) -> httpx.Response:
    return server.post(COUNT_PATH, {"model": MODEL, "input": input} | fields)


def counted(reply: httpx.Response) -> int:
    return InputTokenCountResponse.model_validate_json(reply.text, strict=True).input_tokens


COUNTED: dict[str, dict[str, Any]] = {
    "text": {},
    "instructions": {"instructions": "Be kind.", "max_output_tokens": 9},
    "items": {"input": [*PAIR, {"role": "user", "content": "c"}, CALL, RESULT]},
    "tools": {"tools": [F]},
    "a named tool": {"tools": [F], "tool_choice": {"type": "function", "name": "f"}},
    "allowed tools": {"tools": [F, F | {"name": "g"}], "tool_choice": CHOSEN},
    "no tool": {"tools": [F], "tool_choice": "none", "parallel_tool_calls": True},
    "a format": {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
    "truncation": {"input": [*PAIR * 400, *PAIR[:1]], "truncation": "auto"},
    "truncation for more": {
        "input": [*PAIR * 400, *PAIR[:1]],
        "truncation": "auto",
        "max_output_tokens": 1000,
    },
    "variables of the template": {"chat_template_kwargs": {"x": 1}, "reasoning": {"effort": "low"}},
}


@pytest.mark.parametrize("fields", COUNTED.values(), ids=COUNTED)
@pytest.mark.parametrize("goes_on", [False, True])
def test_the_count_is_that_of_the_response(
    server: Server, fields: dict[str, Any], goes_on: bool
) -> None:
    before = ask(server, "before", instructions="no more").json()["id"] if goes_on else None
    fields = fields | {"previous_response_id": before}
    num_submitted, num_kept = len(server.engine.submitted), len(server.context.kept)
    reply = count(server, **fields)
    found = counted(reply)
    assert (len(server.engine.submitted), len(server.context.kept)) == (num_submitted, num_kept)
    response = ask(server, **fields)
    assert found == response.json()["usage"]["input_tokens"]
    assert found == len(server.engine.submitted[-1].prompt_ids)
    assert reply.headers.get("x-aerie-warning") == response.headers.get("x-aerie-warning")
    server.context.grammars.close()


def test_truncation_leaves_out_as_much_as_the_output_needs(server: Server) -> None:
    plain, more = (counted(count(server, **COUNTED[name])) for name in COUNTED if "trunc" in name)
    assert 3000 < more <= 3096 < plain <= 4095


def test_what_a_response_refuses_is_refused_in_its_words(server: Server) -> None:
    known = set(InputTokensRequest.model_fields)
    shared = [fields for fields, _, _ in REFUSED if set(fields) <= known | {"nonsense"}]
    assert len(shared) > len(REFUSED) / 2
    for fields in shared:
        assert error_of(count(server, **fields), 400) == error_of(ask(server, **fields), 400)
    for name in set(ResponsesRequest.model_fields) - known:
        assert error_of(count(server, **{name: 1}), 400)["param"] == name
    assert server.engine.submitted == []
    server.context.grammars.close()


def test_the_model_and_the_input_may_be_left_out(server: Server) -> None:
    assert server.post(COUNT_PATH, {"input": "hi"}).json() == count(server).json()
    assert counted(server.post(COUNT_PATH, {"instructions": "Be kind."})) > 0
    before = ask(server).json()["id"]
    shorter = counted(server.post(COUNT_PATH, {"previous_response_id": before}))
    assert counted(count(server, previous_response_id=before)) > shorter
    error = error_of(server.post(COUNT_PATH, {"model": MODEL}), 400)
    assert (error["param"], "one of input, instructions" in error["message"]) == ("input", True)


def test_what_is_not_there_is_a_404(make_server: MakeServer) -> None:
    server = make_server(api_keys=("one", "two"))
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    id = server.post(PATH, {"model": MODEL, "input": "hi"}, headers=one).json()["id"]
    body = {"input": "hi", "previous_response_id": id}
    assert counted(server.post(COUNT_PATH, body, headers=one)) > 0
    error = error_of(server.post(COUNT_PATH, body, headers=two), 404)
    assert (error["param"], error["code"]) == ("previous_response_id", "response_not_found")
    unknown = server.post(COUNT_PATH, {"input": "hi", "model": "gpt"}, headers=one)
    assert error_of(unknown, 404)["code"] == "model_not_found"
    refused = server.post(f"{COUNT_PATH}?x=1", body, headers=one)
    assert error_of(refused, 400)["code"] == "unknown_query_parameter"


def test_every_published_field_is_known(server: Server) -> None:
    published = set(get_type_hints(input_token_count_params.InputTokenCountParams))
    known = set(InputTokensRequest.model_fields)
    assert known - published == {"max_output_tokens", "chat_template_kwargs"}
    assert published <= known
    reply = count(server, personality="friendly", reasoning={"effort": "low"})
    assert reply.headers["x-aerie-warning"] == "not used: reasoning, personality"
