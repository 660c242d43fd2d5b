"""The Anthropic client, against a running server."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import pytest

from tests.e2e.conftest import MODEL
from tests.support.servers.live_server import LiveServer, idle
from tests.support.waiting import DEADLINE

ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 8,
    "messages": [{"role": "user", "content": "the quick brown fox"}],
    "extra_body": {"temperature": 0},
}
TOOL: dict[str, Any] = {
    "name": "flag",
    "description": "d",
    "input_schema": {
        "type": "object",
        "properties": {"is_on": {"type": "boolean"}},
        "required": ["is_on"],
        "additionalProperties": False,
    },
}


def options(server: LiveServer) -> dict[str, Any]:
    return {"base_url": server.url, "api_key": "none", "max_retries": 0, "timeout": DEADLINE}


def client_of(server: LiveServer) -> anthropic.Anthropic:
    # Reading the certificates of the world takes longer than most answers.
    plain = anthropic.DefaultHttpxClient(verify=False)
    return anthropic.Anthropic(**options(server), http_client=plain)


def test_whole_and_streamed_messages_agree(server: LiveServer) -> None:
    with client_of(server) as client:
        whole = client.messages.create(**ASKED)
        with client.messages.stream(**ASKED) as stream:
            pieces = list(stream.text_stream)
            final = stream.get_final_message()
        (block,) = whole.content
        assert "".join(pieces) == final.content[0].text == block.text
        assert final.stop_reason == whole.stop_reason
        assert final.usage.output_tokens == whole.usage.output_tokens
        counted = client.messages.count_tokens(model=MODEL, messages=ASKED["messages"])
        cached = whole.usage.cache_read_input_tokens or 0
        assert counted.input_tokens == whole.usage.input_tokens + cached


def test_tools_are_called_and_their_results_read(server: LiveServer) -> None:
    asked = ASKED | {"max_tokens": 400, "tools": [TOOL]}
    asked["tool_choice"] = {"type": "tool", "name": "flag"}
    with client_of(server) as client:
        whole = client.messages.create(**asked)
        (call,) = whole.content
        assert (call.type, call.name, set(call.input)) == ("tool_use", "flag", {"is_on"})
        assert whole.stop_reason == "tool_use"
        with client.messages.stream(**asked) as stream:
            (same,) = stream.get_final_message().content
        assert same.input == call.input
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "done"}
        messages: Any = [
            *ASKED["messages"],
            {"role": "assistant", "content": whole.content},
            {"role": "user", "content": [result]},
        ]
        assert client.messages.create(**ASKED | {"messages": messages}).stop_reason


def test_the_async_client_and_errors(server: LiveServer) -> None:
    async def main() -> None:
        plain = anthropic.DefaultAsyncHttpxClient(verify=False)
        async with anthropic.AsyncAnthropic(**options(server), http_client=plain) as client:
            whole = await client.messages.create(**ASKED)
            async with client.messages.stream(**ASKED) as stream:
                final = await stream.get_final_message()
            assert final.content[0].text == whole.content[0].text
            with pytest.raises(anthropic.BadRequestError, match="max_tokens is 0") as caught:
                await client.messages.create(**ASKED | {"max_tokens": 0})
            assert caught.value.request_id
            with pytest.raises(anthropic.NotFoundError):
                await client.messages.create(**ASKED | {"model": "other"})

    asyncio.run(main())
    server.wait_metrics(idle)
