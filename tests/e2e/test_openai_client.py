"""The helpers of the OpenAI client, against a running server."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from tests.e2e.conftest import MAX_LEN, MODEL
from tests.support.servers.live_server import LiveServer, idle
from tests.support.waiting import DEADLINE

MESSAGES: Any = [{"role": "user", "content": "the quick brown fox"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
LONG: dict[str, Any] = {"ignore_eos": True}


def test_raw_responses_hold_headers_and_typed_replies(server: LiveServer) -> None:
    client = server.client()
    raw = client.chat.completions.with_raw_response.create(
        **CHAT, user="u", logprobs=True, top_logprobs=2, extra_headers={"x-request-id": "mine"}
    )
    reply = raw.parse()
    assert raw.headers["x-request-id"] == reply._request_id == "mine"
    assert raw.headers["x-aerie-warning"] == "not used: user"
    ChatCompletion.model_validate_json(raw.text, strict=True)
    assert reply.choices[0].logprobs.content[0].top_logprobs
    assert reply.usage.prompt_tokens_details.cached_tokens >= 0
    assert reply.system_fingerprint.startswith("fp_")
    text = client.completions.with_raw_response.create(model=MODEL, prompt="a", logprobs=1)
    Completion.model_validate_json(text.text, strict=True)


def test_the_stream_helper_gathers_what_the_whole_reply_says(server: LiveServer) -> None:
    client = server.client()
    whole = client.chat.completions.create(**CHAT, logprobs=True)
    with client.chat.completions.stream(
        **CHAT, logprobs=True, stream_options={"include_usage": True}, extra_body=LONG
    ) as stream:
        kinds = {event.type for event in stream}
        gathered = stream.current_completion_snapshot
    assert {"chunk", "content.delta", "logprobs.content.delta"} <= kinds
    begun = whole.choices[0].message.content or ""
    assert gathered.choices[0].message.content.startswith(begun)
    assert gathered.choices[0].finish_reason == "length"
    assert gathered.usage.completion_tokens == len(gathered.choices[0].logprobs.content) == 8
    with client.chat.completions.with_streaming_response.create(**CHAT, stream=True) as response:
        lines = list(response.iter_lines())
    assert lines[-2] == "data: [DONE]" or lines[-1] == "data: [DONE]"


def test_the_async_client_does_the_same(server: LiveServer) -> None:
    async def main() -> tuple[Any, Any]:
        async with server.async_client() as client:
            whole = await client.chat.completions.create(**CHAT, seed=1)
            async with client.chat.completions.stream(**CHAT, seed=1) as stream:
                async for _ in stream:
                    pass
                return whole, stream.current_completion_snapshot

    whole, gathered = asyncio.run(main())
    assert gathered.choices[0].message.content == whole.choices[0].message.content
    assert gathered.choices[0].finish_reason == whole.choices[0].finish_reason


def test_models_are_typed(server: LiveServer) -> None:
    client = server.client()
    (model,) = client.models.list()
    assert client.models.retrieve(MODEL) == model
    assert (model.id, model.max_model_len) == (MODEL, MAX_LEN)
    assert model.root == server.resolved["config"]["model"]["source"]


@pytest.mark.parametrize(
    ("fields", "kind", "param", "code"),
    [
        ({"temperature": 9}, openai.BadRequestError, "temperature", None),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "unknown_field"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "messages", "context_length_exceeded"),
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
    ],
)
def test_errors_are_of_their_class_and_name_the_field(
    server: LiveServer, fields: dict[str, Any], kind: Any, param: str, code: str | None
) -> None:
    with pytest.raises(kind) as caught:
        server.client().chat.completions.create(**CHAT | fields)
    error = caught.value
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert error.request_id


def test_a_client_that_times_out_frees_its_place(server: LiveServer) -> None:
    endless = CHAT | {"max_tokens": MAX_LEN - 200, "extra_body": LONG}
    impatient = server.client(timeout=httpx.Timeout(DEADLINE, read=0.3))
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(**endless, extra_headers={"x-request-id": "impatient"})
    server.log.wait_for("request_id=impatient")  # written at its end
    server.wait_metrics(idle)
