"""/v1/responses: what the model is shown, what is answered, what is refused and what is kept."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable
from typing import Any, get_type_hints

import httpx
import pytest
from openai.types.responses import Response, response_create_params

from engine.messages import ErrorCode
from engine.request import FinishReason
from server.openai.request.fields import HARMLESS
from server.openai.responses.request import ResponsesRequest
from server.text.tokens.tokenizer import Tokenizer
from tests.server.openai.test_refusals import error_of
from tests.support.engines.scripted_engine import fail, finished, say, tokens
from tests.support.models.tiny_llama import EOS
from tests.support.servers.http_server import MODEL, Server
from tests.support.waiting import DEADLINE, PAUSE

MakeServer = Callable[..., Server]
PATH = "/v1/responses"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
F = {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": False}
CALL_TEXT = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "7"}
THINKING = "{% if false %}<think></think>{% endif %}"  # shows `auto` that the model thinks


@pytest.fixture
def make_server(make_server: MakeServer) -> MakeServer:
    return functools.partial(make_server, max_model_len=4096)


@pytest.fixture
def server(make_server: MakeServer) -> Server:
    return make_server()


def ask(server: Server, input: Any = "hi", **fields: Any) -> httpx.Response:
    return server.post(PATH, {"model": MODEL, "input": input} | fields)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; each has its name on its own line, too, and they are numbered."""
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def kinds(found: list[dict[str, Any]]) -> list[str]:
    """The types of events; repeated deltas count once."""
    names = [event["type"].removeprefix("response.") for event in found]
    return [name for at, name in enumerate(names) if at == 0 or names[at - 1] != name]


def prompt_of(server: Server) -> str:
    return server.tokenizer.decode(
        server.engine.submitted[-1].prompt_ids, skip_special_tokens=False
    )


def test_a_response_is_typed_and_says_what_was_asked(server: Server) -> None:
    reply = ask(server, instructions="Be kind.", metadata={"k": "v"}, max_output_tokens=99)
    found = Response.model_validate_json(reply.text, strict=True)
    assert (found.status, found.output_text, found.metadata) == (
        "completed",
        "hello there",
        {"k": "v"},
    )
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert "x-aerie-warning" not in reply.headers
    assert prompt_of(server) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_items_are_shown_as_the_messages_they_stand_for(server: Server) -> None:
    part = {"type": "input_text", "text": "hi"}
    answer = {"type": "output_text", "text": "so", "annotations": []}
    items = [
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [part, part]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
        {
            "type": "message",
            "role": "assistant",
            "content": [answer],
            "id": "m",
            "status": "completed",
        },
        CALL,
        RESULT,
        {"role": "user", "content": "go"},
    ]
    assert ask(server, items).status_code == 200
    plain = server.chat(
        messages=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}] * 2},
            {
                "role": "assistant",
                "content": "so",
                "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "7"},
            {"role": "user", "content": "go"},
        ]
    )
    assert plain.status_code == 200
    first, second = server.engine.submitted
    assert first.prompt_ids == second.prompt_ids


STREAMS = {
    "text": (
        "hello",
        {},
        ["output_item.added", "content_part.added", "output_text.delta", "output_text.done",
         "content_part.done", "output_item.done", "completed"],
    ),
    "nothing": (
        "",
        {},
        ["output_item.added", "content_part.added", "output_text.done", "content_part.done",
         "output_item.done", "completed"],
    ),
    "cut": (
        "hello",
        {"max_output_tokens": 1},
        ["output_item.added", "content_part.added", "output_text.delta", "output_text.done",
         "content_part.done", "output_item.done", "incomplete"],
    ),
    "call": (
        CALL_TEXT,
        {"tools": [F]},
        ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
         "output_item.done", "completed"],
    ),
    "thought": (
        "<think>hm</think>so",
        {},
        ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
         "content_part.done", "output_item.done", "output_item.added", "content_part.added",
         "output_text.delta", "output_text.done", "content_part.done", "output_item.done",
         "completed"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "fields", "expected"), STREAMS.values(), ids=STREAMS)
def test_a_stream_has_the_published_events_and_joins_to_the_whole(
    make_server: MakeServer,
    tokenizer: Tokenizer,
    text: str,
    fields: dict[str, Any],
    expected: list[str],
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    server = make_server(say([*ids, EOS]), model={"reasoning_parser": "think"})
    found = events(ask(server, stream=True, **fields))
    assert kinds(found) == ["created", "in_progress", *expected]
    last = found[-1]["response"]
    assert Response.model_validate(last, strict=True).object == "response"
    assert server.get(f"{PATH}/{last['id']}").json() == last
    deltas: dict[int, str] = {}
    for event in found:
        if event["type"].endswith(".delta"):
            at = event["output_index"]
            assert event["item_id"] == last["output"][at]["id"]
            deltas[at] = deltas.get(at, "") + event["delta"]
        elif event["type"].endswith("item.done"):
            assert event["item"] == last["output"][event["output_index"]]
    whole = ask(server, **fields).json()
    assert [texts_of(item) for item in whole["output"]] == list(deltas.values()) or not text
    assert [texts_of(item) for item in last["output"]] == [texts_of(i) for i in whole["output"]]
    assert whole["status"] == last["status"] == expected[-1]
    if whole["status"] == "incomplete":
        assert whole["incomplete_details"] == {"reason": "max_output_tokens"}


def texts_of(item: dict[str, Any]) -> str:
    if item["type"] == "function_call":
        return str(item["arguments"])
    return "".join(part["text"] for part in item["content"])


@pytest.mark.parametrize("step", [1, 3])
def test_log_probabilities_are_those_of_the_text(make_server: MakeServer, step: int) -> None:
    """Also of text that might have been the mark of a call, so that it comes late."""
    server = make_server(model={"reasoning_parser": "think"})
    server.engine.script = say(server.ids("<think>hm</think>so<tool a<tool_ca"), step)
    include = ["message.output_text.logprobs"]
    asked: dict[str, Any] = {"include": include, "top_logprobs": 2, "tools": [F]}
    found = ask(server, **asked).json()["output"][1]["content"][0]
    assert found["text"] == "so<tool a<tool_ca"
    assert "".join(entry["token"] for entry in found["logprobs"]) == found["text"]
    assert {len(entry["top_logprobs"]) for entry in found["logprobs"]} == {2}
    streamed = events(ask(server, stream=True, **asked))
    deltas = [event for event in streamed if event["type"] == "response.output_text.delta"]
    assert [e for delta in deltas for e in delta["logprobs"]] == found["logprobs"]


def test_a_failure_after_the_first_event_is_told_by_the_stream(make_server: MakeServer) -> None:
    server = make_server(fail([5], "secret"))
    found = events(ask(server, stream=True))
    assert kinds(found)[-1] == "failed"
    last = found[-1]["response"]
    assert (last["status"], last["error"]["code"]) == ("failed", "server_error")
    assert "secret" not in last["error"]["message"]
    assert server.get(f"{PATH}/{last['id']}").json() == last
    error = error_of(ask(server, previous_response_id=last["id"]), 400)
    assert error["param"] == "previous_response_id"
    server.engine.script = fail([], "too long", ErrorCode.CONTEXT_LENGTH)
    assert error_of(ask(server, stream=True), 400)["code"] == "context_length_exceeded"


def message(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"input": []}, "input", "at least 1 entry"),
    ({"input": message({"type": "input_image"})}, "input[0].content[0].type", '"input_text"'),
    ({"input": [{"type": "computer_call"}]}, "input[0].type", '"function_call"'),
    ({"input": [{"role": "user"}]}, "input[0].content", "content is missing"),
    ({"input": [CALL | {"role": "user"}]}, "input[0].role", 'the type "function_call"'),
    ({"input": [RESULT]}, "input[0].call_id", '"c1": it must be the id of a call'),
    (
        {"input": [{"role": "user", "content": "a"}, CALL, CALL]},
        "input[2].call_id",
        'input[2].call_id is "c1": another call',
    ),
    (
        {"input": [{"role": "assistant", "content": "a"}, CALL, CALL]},
        "input[2].call_id",
        'input[2].call_id is "c1": another call',
    ),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", 'it must be "function"'),
    ({"tools": [F, F]}, "tools", 'tools[1].name is "f": another function has this name'),
    ({"tool_choice": "required"}, "tool_choice", "only allowed with tools"),
    ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice.name", "is required"),
    (
        {"tools": [F], "tool_choice": {"type": "function", "name": "g"}},
        "tool_choice",
        'names the function "g"',
    ),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "missing"),
    (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"not": {}}}}},
        "text.format.schema",
        'the keyword "not" is not supported',
    ),
    (
        {"tools": [F], "tool_choice": "required", "text": {"format": {"type": "json_object"}}},
        "tool_choice",
        'with text.format only "auto" and "none" are',
    ),
    ({"max_output_tokens": 9999}, "input", "maximum context length is 4096 tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
    ({"temperature": 3}, "temperature", "at most 2"),
    ({"metadata": {"k": 1}}, "metadata.k", "be a string"),
    ({"top_logprobs": 21}, "top_logprobs", "at most 20"),
    ({"background": True, "stream": True}, "background", "not with stream true"),
    ({"background": True, "store": False}, "background", "not with store false"),
    ({"speculation": {"trace": True}}, "speculation.trace", "must be false"),
    ({"speculation": {"trace": 0}}, "speculation.trace", "must be false"),
    ({"conversation": "c"}, "conversation", "not supported"),
    ({"prompt": {"id": "p"}}, "prompt", "not supported"),
    ({"nonsense": 1}, "nonsense", "Unknown field"),
    ({"truncation": "some"}, "truncation", '"auto" or "disabled"'),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
def test_what_cannot_be_done_is_a_400_that_names_the_field(
    server: Server, fields: dict[str, Any], param: str, words: str
) -> None:
    error = error_of(ask(server, **fields), 400)
    assert (error["param"], words in error["message"]) == (param, True), error
    assert "messages" not in error["message"]
    assert server.engine.submitted == []
    server.context.grammars.close()


@pytest.mark.parametrize("path", ["/cancel", "/input_items", ""])
def test_an_unknown_query_parameter_is_told_those_that_are_known(server: Server, path: str) -> None:
    id = ask(server).json()["id"]
    method = {"/cancel": "POST", "/input_items": "GET", "": "DELETE"}[path]
    message = error_of(server.request(method, f"{PATH}/{id}{path}?x=1"), 400)["message"]
    known = (
        "known are limit, order, after, include" if path == "/input_items" else "this path has none"
    )
    assert message == f'Unknown query parameter "x": {known}'


def test_every_published_field_is_known_and_harmless_ones_are_named(server: Server) -> None:
    published = get_type_hints(response_create_params.ResponseCreateParamsBase)
    later = {"access_programs", "background_options", "image"}  # of OpenAI's own models
    known = set(ResponsesRequest.model_fields)
    assert set(published) - known <= later  # an older client lacks some of them
    assert known.isdisjoint(later)
    asked = {"reasoning": {"effort": "low"}, "user": "u", "include": ["file_search_call.results"]}
    reply = ask(server, **asked)
    named = reply.headers["x-aerie-warning"].removeprefix("not used: ").split(", ")
    assert set(named) == {"reasoning", "user", "include[0]"}
    assert HARMLESS in str(ResponsesRequest.model_fields["reasoning"].description)


def test_a_conversation_goes_on_after_a_stored_response(server: Server) -> None:
    first = ask(server, "one", instructions="Be kind.").json()
    second = ask(server, "two", previous_response_id=first["id"]).json()
    assert ask(server, "three", previous_response_id=second["id"]).status_code == 200
    texts = ["one", "hello there", "two", "hello there", "three"]
    roles = ["user", "assistant"] * 3
    assert (
        prompt_of(server)
        == "".join(
            f"<|im_start|>{role}\n{text}<|im_end|>\n"
            for role, text in zip(roles, texts, strict=False)
        )
        + "<|im_start|>assistant\n"
    )
    assert server.request("DELETE", f"{PATH}/{first['id']}").json()["deleted"]
    error = error_of(ask(server, previous_response_id=second["id"]), 404)
    assert (error["param"], first["id"] in error["message"]) == ("previous_response_id", True)
    assert error_of(server.get(f"{PATH}/{first['id']}"), 404)["code"] == "response_not_found"


def test_input_items_are_listed_page_by_page(server: Server) -> None:
    items = [{"role": "user", "content": text} for text in "abc"]
    path = f"{PATH}/{ask(server, items).json()['id']}/input_items"
    texts = lambda page: [item["content"][0]["text"] for item in page["data"]]  # noqa: E731
    page = server.get(path, params={"order": "asc", "limit": 2}).json()
    assert (texts(page), page["has_more"]) == (["a", "b"], True)
    rest = server.get(path, params={"order": "asc", "after": page["last_id"]}).json()
    assert (texts(rest), rest["has_more"]) == (["c"], False)
    assert texts(server.get(path).json()) == ["c", "b", "a"]
    for query, param in (
        ({"limit": 0}, "limit"),
        ({"after": "x"}, "after"),
        ({"order": 1}, "order"),
    ):
        assert error_of(server.get(path, params=query), 400)["param"] == param
    assert error_of(server.get(path, params={"x": 1}), 400)["code"] == "unknown_query_parameter"


def test_what_is_not_to_be_stored_is_not(make_server: MakeServer) -> None:
    reply = ask(make_server(), store=False).json()
    assert reply["store"] is False
    server = make_server(max_stored_responses=0)
    reply = ask(server).json()
    assert reply["store"] is False
    assert server.get(f"{PATH}/{reply['id']}").status_code == 404
    assert error_of(ask(server, store=True), 400)["param"] == "store"
    assert error_of(ask(server, background=True), 400)["param"] == "background"


def test_each_key_sees_its_own_responses(make_server: MakeServer) -> None:
    server = make_server(api_keys=("one", "two"))
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    id = server.post(PATH, {"model": MODEL, "input": "hi"}, headers=one).json()["id"]
    assert server.get(f"{PATH}/{id}", headers=one).status_code == 200
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        assert server.request(method, f"{PATH}/{id}{path}", headers=two).status_code == 404
    body = {"model": MODEL, "input": "hi", "previous_response_id": id}
    assert server.post(PATH, body, headers=two).status_code == 404


def test_truncation_leaves_out_the_oldest_turns(make_server: MakeServer) -> None:
    server = make_server(max_model_len=160)
    turns = [
        {"role": role, "content": f"{role} {number} {'x' * 20}"}
        for number in range(4)
        for role in ("user", "assistant")
    ]
    items = [{"role": "system", "content": "s"}, *turns, {"role": "user", "content": "last"}]
    asked = {"max_output_tokens": 8}
    assert error_of(ask(server, items, **asked), 400)["code"] == "context_length_exceeded"
    assert ask(server, items, truncation="auto", **asked).status_code == 200
    shown = prompt_of(server)
    assert shown.startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nuser 3")
    assert "user 2" not in shown
    assert len(server.engine.submitted[-1].prompt_ids) <= 152
    items[-1]["content"] = "y" * 400
    assert error_of(ask(server, items, truncation="auto"), 400)["param"] == "input"


def test_what_truncation_leaves_out_costs_nothing(make_server: MakeServer) -> None:
    server = make_server(max_model_len=160)
    rendered: list[int] = []
    render = server.context.renderer.render

    def counted(messages: Any, *how: Any) -> Any:
        rendered.append(len(messages))
        return render(messages, *how)

    server.context.renderer.render = counted  # type: ignore[method-assign]
    turns = [{"role": "user", "content": f"turn {number}"} for number in range(3000)]
    cases: list[tuple[list[dict[str, Any]], int]] = [
        (turns, 200),
        ([{"role": "user", "content": "y" * 9000}, *turns[:9]], 200),
        ([{"role": "system", "content": "y" * 9000}, *turns], 400),
        ([*turns, {"role": "user", "content": "y" * 9000}], 400),
    ]
    for items, status in cases:
        rendered.clear()
        assert ask(server, items, truncation="auto", max_output_tokens=8).status_code == status
        assert sum(rendered) < 200, rendered
    ask(server, turns, truncation="auto", max_output_tokens=8)
    shown = prompt_of(server)
    assert 2 < shown.count("user\nturn ") < 20
    assert shown.count("user\nturn 2999") == 1


def test_a_conversation_is_no_longer_than_a_body(make_server: MakeServer) -> None:
    server = make_server(max_body_bytes=10_000)
    system = {"role": "system", "content": "Be kind."}
    id = ask(server, [system, {"role": "user", "content": "x" * 1900}]).json()["id"]
    for number in range(3):
        fields = {"previous_response_id": id, "truncation": "auto"}
        id = ask(server, f"{number} " + "z" * 1900, **fields).json()["id"]
    error = error_of(ask(server, previous_response_id=id), 400)
    assert (error["param"], error["code"]) == ("previous_response_id", "context_length_exceeded")
    assert "server.max_body_bytes" in error["message"]
    assert ask(server, previous_response_id=id, truncation="auto").status_code == 200
    shown = prompt_of(server)
    assert "Be kind." in shown
    assert "xxx" not in shown
    assert "2 zzz" in shown


async def status_after(client: httpx.AsyncClient, path: str, status: str) -> dict[str, Any]:
    """The response once it no longer has this status."""
    async with asyncio.timeout(DEADLINE):
        while True:
            reply: dict[str, Any] = (await client.get(path)).json()
            if reply["status"] != status:
                return reply
            await asyncio.sleep(PAUSE)


def test_a_response_in_the_background_can_be_fetched_and_cancelled(make_server: MakeServer) -> None:
    server = make_server(say([5], ends=False), max_background_responses=1)

    async def work(client: httpx.AsyncClient) -> None:
        body = {"model": MODEL, "input": "hi", "background": True}

        async def start() -> str:
            queued = (await client.post(PATH, json=body)).json()
            assert (queued["status"], queued["background"]) == ("queued", True)
            return f"{PATH}/{queued['id']}"

        path = await start()
        error_of(await client.post(PATH, json=body), 429)
        assert (await status_after(client, path, "queued"))["status"] == "in_progress"
        assert server.context.state.num_open == 1
        request = server.engine.submitted[-1]
        server.engine.feed(tokens(request, server.ids("ho")))
        server.engine.feed(finished(request, FinishReason.STOP, 3))
        reply = await status_after(client, path, "in_progress")
        assert (reply["status"], reply["output"][0]["status"]) == ("completed", "completed")
        assert (await client.post(f"{path}/cancel")).json() == reply

        second = await start()
        await status_after(client, second, "queued")
        assert (await client.post(f"{second}/cancel")).json()["status"] == "cancelled"
        assert server.engine.open_ids == []
        third = await start()
        assert (await client.delete(third)).json()["deleted"]
        assert (await client.get(third)).status_code == 404
        server.engine.script = fail([], "secret")
        failing = await start()
        await status_after(client, failing, "queued")
        reply = await status_after(client, failing, "in_progress")
        assert (reply["status"], reply["error"]["code"]) == ("failed", "server_error")

    server.run(work)
    assert server.context.state.num_open == 0
    assert server.context.admission.num_waiting == 0


def test_a_response_in_the_background_is_stored_until_it_ends(make_server: MakeServer) -> None:
    server = make_server(say([5], ends=False), max_stored_responses=1)

    async def work(client: httpx.AsyncClient) -> None:
        body = {"model": MODEL, "input": "hi", "background": True}
        first, second = [(await client.post(PATH, json=body)).json()["id"] for _ in range(2)]
        for id in (first, second):
            assert (await client.get(f"{PATH}/{id}")).status_code == 200
        reply = await client.post(f"{PATH}/{first}/cancel")
        assert reply.json()["status"] == "cancelled"
        assert (await client.delete(f"{PATH}/{second}")).json()["deleted"]
        assert len(server.context.kept) <= 1

    server.run(work)
    assert server.engine.open_ids == []


def test_requests_at_once_share_the_room_in_the_background(make_server: MakeServer) -> None:
    server = make_server(say([5], ends=False), max_background_responses=2)

    async def work(client: httpx.AsyncClient) -> None:
        body = {"model": MODEL, "input": "hi", "background": True}
        replies = await asyncio.gather(*(client.post(PATH, json=body) for _ in range(5)))
        assert sorted(reply.status_code for reply in replies) == [200, 200, 429, 429, 429]
        for reply in replies:
            if reply.status_code == 200:
                await client.delete(f"{PATH}/{reply.json()['id']}")
        assert (await client.post(PATH, json=body | {"model": "other"})).status_code == 404
        assert (await client.post(PATH, json=body)).status_code == 200
        assert (await client.post(PATH, json=body)).status_code == 200

    server.run(work)
    assert server.context.admission.num_waiting == 0


def test_only_what_is_made_in_the_background_can_be_cancelled(server: Server) -> None:
    id = ask(server).json()["id"]
    error = error_of(server.post(f"{PATH}/{id}/cancel", {}), 400)
    assert "background" in error["message"]
