"""The OpenAI client's helpers for responses, against a running server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from tests.e2e.conftest import MODEL
from tests.support.servers.live_server import LiveServer, idle

ASKED: dict[str, Any] = {"model": MODEL, "input": "the quick brown fox", "temperature": 0}


class Flag(BaseModel):
    """Whatever the model draws, one of these few words fits."""

    is_on: bool


TOOL: Any = openai.pydantic_function_tool(Flag, name="flag")


def test_whole_and_streamed_responses_agree(server: LiveServer) -> None:
    client = server.client()
    raw = client.responses.with_raw_response.create(**ASKED, max_output_tokens=8)
    Response.model_validate_json(raw.text, strict=True)
    whole = raw.parse()
    assert client.responses.retrieve(whole.id).output == whole.output
    with client.responses.stream(**ASKED, max_output_tokens=8) as stream:
        seen = list(stream)
    deltas = [event.delta for event in seen if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert (seen[0].type, seen[-1].type) == ("response.created", f"response.{whole.status}")


def test_a_conversation_is_stored_listed_and_deleted(server: LiveServer) -> None:
    client = server.client()
    first = client.responses.create(**ASKED, max_output_tokens=4)
    then = client.responses.create(
        **ASKED | {"input": "more"}, max_output_tokens=4, previous_response_id=first.id
    )
    sent_back: Any = [{"role": "user", "content": ASKED["input"]}]
    sent_back += [item.model_dump(exclude_none=True) for item in first.output]
    sent_back += [{"role": "user", "content": "more"}]
    same = client.responses.create(**ASKED | {"input": sent_back}, max_output_tokens=4, store=False)
    assert same.output_text == then.output_text
    (item,) = client.responses.input_items.list(then.id, limit=5, order="asc")
    assert item.content[0].text == "more"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**ASKED, previous_response_id=first.id)


def test_the_count_of_input_tokens_is_the_usage_of_the_response(server: LiveServer) -> None:
    client = server.client()
    first = client.responses.create(**ASKED, max_output_tokens=4)
    function = TOOL["function"]
    fields: dict[str, Any] = {
        "model": MODEL,
        "input": [{"role": "user", "content": "more"}],
        "instructions": "Be kind.",
        "previous_response_id": first.id,
        "tools": [{"type": "function", **function}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}},
        "truncation": "auto",
    }
    counted = client.responses.input_tokens.count(**fields)
    assert counted.object == "response.input_tokens"
    made = client.responses.create(**fields, max_output_tokens=4)
    assert made.usage is not None
    assert counted.input_tokens == made.usage.input_tokens

    async def count() -> int:
        async with server.async_client() as client:
            return (await client.responses.input_tokens.count(**fields)).input_tokens

    assert asyncio.run(count()) == counted.input_tokens


def test_pydantic_models_are_parsed_from_text_and_calls(server: LiveServer) -> None:
    client = server.client()
    found = client.responses.parse(**ASKED, text_format=Flag)
    assert isinstance(found.output_parsed, Flag)
    with client.responses.stream(**ASKED, text_format=Flag) as stream:
        assert stream.get_final_response().output_parsed == found.output_parsed
    asked = {**ASKED, "tools": [TOOL], "tool_choice": {"type": "function", "name": "flag"}}
    (call,) = client.responses.parse(**asked).output
    assert isinstance(call.parsed_arguments, Flag)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    items = [{"role": "user", "content": "go"}, call.model_dump(exclude_none=True), result]
    assert client.responses.create(**ASKED | {"input": items}, max_output_tokens=4).output
    with client.responses.stream(**asked) as stream:
        (same,) = stream.get_final_response().output
    assert json.loads(same.arguments) == json.loads(call.arguments)


def test_the_async_client_and_background_responses(server: LiveServer) -> None:
    async def main() -> None:
        async with server.async_client() as client:
            found = await client.responses.parse(**ASKED, text_format=Flag)
            async with client.responses.stream(**ASKED, text_format=Flag) as stream:
                final = await stream.get_final_response()
            assert final.output_parsed == found.output_parsed
            endless = {"ignore_eos": True}
            begun = await client.responses.create(**ASKED, background=True, extra_body=endless)
            assert begun.status == "queued"
            assert (await client.responses.cancel(begun.id)).status == "cancelled"

    asyncio.run(main())
    server.wait_metrics(idle)
