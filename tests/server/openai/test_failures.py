"""Engine failures, clients that disconnect, full queues."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from engine.messages import ErrorCode
from engine.request import FinishReason, Request
from tests.server.openai.test_refusals import error_of
from tests.support.engines.scripted_engine import INFO, Event, fail, finished, say, tokens
from tests.support.servers.http_server import (
    CHAT,
    CHAT_PATH,
    COMPLETION_PATH,
    OpenCall,
    Server,
    events_of,
)

MakeServer = Callable[..., Server]
SECRET = "CUDA error at 0xdeadbeef"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_engine_error_before_the_first_byte_is_500(
    make_server: MakeServer, stream: bool, n: int
) -> None:
    server = make_server(fail([], SECRET))
    response = server.chat(stream=stream, n=n)
    assert error_of(response, 500)["type"] == "server_error"
    assert SECRET not in response.text
    assert server.context.admission.num_waiting == 0
    assert len(set(server.engine.aborted)) == len(server.engine.aborted) <= n - 1


def test_engine_error_after_tokens_is_500_when_not_streaming(make_server: MakeServer) -> None:
    error_of(make_server(fail([75], SECRET)).chat(), 500)


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
def test_engine_error_after_the_first_byte_is_an_event_without_done(
    make_server: MakeServer, path: str
) -> None:
    content = CHAT if path == CHAT_PATH else {"model": "tiny", "prompt": "hi"}
    response = make_server(fail([75], SECRET)).post(path, content | {"stream": True})
    *_, last = events_of(response)
    assert response.status_code == 200
    assert list(last) == ["error"]
    assert last["error"]["type"] == "server_error"
    assert SECRET not in response.text
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reason", "code"),
    [(ErrorCode.CONTEXT_LENGTH, "context_length_exceeded"), (ErrorCode.INVALID, None)],
)
def test_what_the_engine_refuses_is_400(
    make_server: MakeServer, stream: bool, reason: ErrorCode, code: str | None
) -> None:
    server = make_server(fail([], "too long by 8", reason))
    error = error_of(server.chat(stream=stream), 400)
    assert (error["code"], error["message"]) == (code, "too long by 8")


def test_every_reason_of_the_engine_has_its_own_answer(make_server: MakeServer) -> None:
    unknown = make_server(fail([], "why")).chat().text
    for reason in ErrorCode:
        response = make_server(fail([], "why", reason)).chat()
        assert response.status_code in (400, 500 if reason is ErrorCode.UNSOUND else 503)
        assert response.text != unknown


def test_an_error_without_its_code_is_no_refusal(make_server: MakeServer) -> None:
    text = "This model's maximum context length is 32 tokens; the server is shutting down"
    error_of(make_server(fail([], text)).chat(), 500)


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_requests_cut_by_the_end_of_the_server_get_that_error(
    make_server: MakeServer, path: str, stream: bool, num_tokens: int
) -> None:
    content = CHAT if path == CHAT_PATH else {"model": "tiny", "prompt": "hi"}
    server = make_server(fail([75] * num_tokens, SECRET, ErrorCode.STOPPING))
    response = server.post(path, content | {"stream": stream})
    if stream and num_tokens:
        assert response.status_code == 200
        error = events_of(response)[-1]["error"]
        assert "[DONE]" not in response.text
    else:
        error = error_of(response, 503)
        assert response.headers["retry-after"] == "1"
    assert (error["type"], error["code"]) == ("unavailable_error", "draining")
    assert error["message"] == "The server is shutting down"


def test_abort_by_the_engine_is_an_error(make_server: MakeServer) -> None:
    server = make_server(lambda request: [finished(request, FinishReason.ABORT)])
    error_of(server.chat(), 500)


class BrokenEngine:
    """A client whose streams raise: a bug, not an engine that died."""

    info = INFO
    stats = None

    def __init__(self, tokens_first: bool) -> None:
        self._tokens_first = tokens_first
        self.aborted: list[str] = []

    async def submit(self, request: Request) -> AsyncIterator[Event]:
        if self._tokens_first:
            yield tokens(request, [75])
        raise RuntimeError(SECRET)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


@pytest.mark.parametrize("n", [1, 2])
def test_bugs_are_500_without_internals_and_the_server_goes_on(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture, n: int
) -> None:
    server = make_server()
    broken = BrokenEngine(False)
    object.__setattr__(server.context, "client", broken)
    response = server.chat(n=n)
    assert error_of(response, 500)["code"] == "internal_error"
    assert SECRET not in response.text
    assert SECRET in caplog.text
    assert len(broken.aborted) == n
    object.__setattr__(server.context, "client", server.engine)
    assert server.chat().status_code == 200
    assert server.context.state.num_open == 0


def test_bugs_in_a_running_stream_end_it_with_an_error_event(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server()
    object.__setattr__(server.context, "client", BrokenEngine(True))
    response = server.chat(stream=True)
    assert events_of(response)[-1]["error"]["type"] == "server_error"
    assert SECRET not in response.text
    assert SECRET in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_tokens", [0, 2])
def test_a_client_that_leaves_aborts_every_choice_once(
    make_server: MakeServer, stream: bool, n: int, num_tokens: int
) -> None:
    server = make_server(say([75] * num_tokens, ends=False) if num_tokens else lambda _: [])

    async def main() -> None:
        call = OpenCall(server, CHAT_PATH, CHAT | {"n": n, "stream": stream})
        while len(server.engine.submitted) < n:
            await asyncio.sleep(0)
        if stream and num_tokens:
            assert (await call.sent.get())["type"] == "http.response.start"
        call.leave()
        await call.task

    asyncio.run(main())
    assert sorted(server.engine.aborted) == [r.request_id for r in server.engine.submitted]
    assert server.engine.open_ids == []
    assert server.context.admission.num_waiting == 0
    assert server.context.admission.waiting_tokens == 0
    assert server.context.state.num_open == 0


def test_finished_choices_are_not_aborted_when_the_client_leaves(make_server: MakeServer) -> None:
    def script(request: Request) -> list[Event]:
        if request.request_id.endswith("-0"):
            return [tokens(request, [75]), finished(request, FinishReason.LENGTH, 1)]
        return [tokens(request, [75])]

    server = make_server(script)

    async def main() -> None:
        call = OpenCall(server, CHAT_PATH, CHAT | {"n": 2, "stream": True})
        for _ in range(3):  # the head, then both beginnings and the end of choice 0
            await call.sent.get()
        call.leave()
        await call.task

    asyncio.run(main())
    assert server.engine.aborted == [server.engine.submitted[1].request_id]


async def wait_open(server: Server, count: int) -> None:
    while len(server.engine.open_ids) < count:
        await asyncio.sleep(0)


def silent(_: Request) -> list[Event]:
    return []


def test_a_full_queue_is_429_until_a_first_token_comes(make_server: MakeServer) -> None:
    server = make_server(silent, max_queued_requests=2, retry_after=7)

    async def main(client: httpx.AsyncClient) -> httpx.Response:
        calls = [OpenCall(server, CHAT_PATH, CHAT) for _ in range(2)]
        await wait_open(server, 2)
        refusal = await client.post(CHAT_PATH, json=CHAT)
        first, second = server.engine.submitted
        server.engine.feed(tokens(first, [75]))
        while server.context.admission.num_waiting == 2:
            await asyncio.sleep(0)
        third = OpenCall(server, CHAT_PATH, CHAT)
        await wait_open(server, 3)
        for request in (first, second, server.engine.submitted[2]):
            server.engine.feed(finished(request, FinishReason.LENGTH, 1))
        await asyncio.gather(third.task, *(call.task for call in calls))
        return refusal

    response = server.run(main)
    error = error_of(response, 429)
    assert error["type"] == "rate_limit_error"
    assert "2 requests are waiting" in error["message"]
    assert response.headers["retry-after"] == "7"
    assert server.context.admission.num_waiting == 0
    assert 'admission_rejections_total{model_name="tiny",reason="requests"} 1.0' in (
        server.get("/metrics").text
    )


def test_many_choices_of_one_request_leave_the_queue_open_for_others(
    make_server: MakeServer,
) -> None:
    server = make_server(silent, max_queued_requests=2, max_waiting_tokens=30)
    body = {"model": "tiny", "prompt": [5] * 20}

    async def main(client: httpx.AsyncClient) -> httpx.Response:
        calls = [OpenCall(server, COMPLETION_PATH, body | {"n": 100})]
        await wait_open(server, 100)
        admission = server.context.admission
        found = (admission.num_requests, admission.num_waiting, admission.waiting_tokens)
        assert found == (1, 100, 20)
        calls.append(OpenCall(server, COMPLETION_PATH, body | {"prompt": [5]}))
        await wait_open(server, 101)
        refusal = await client.post(COMPLETION_PATH, json=body)
        server.engine.feed(tokens(server.engine.submitted[0], [75]))
        while admission.waiting_tokens > 1:  # the prompt is computed
            await asyncio.sleep(0)
        assert (admission.num_requests, admission.num_waiting) == (2, 100)
        for call in calls:
            call.leave()
        await asyncio.gather(*(call.task for call in calls))
        assert (admission.num_requests, admission.num_waiting) == (0, 0)
        return refusal

    assert "2 requests are waiting" in error_of(server.run(main), 429)["message"]
    assert server.engine.open_ids == []


def test_the_choices_of_all_waiting_requests_are_limited_too(make_server: MakeServer) -> None:
    server = make_server(silent, max_queued_choices=6)

    async def main(client: httpx.AsyncClient) -> httpx.Response:
        call = OpenCall(server, CHAT_PATH, CHAT | {"n": 4})
        await wait_open(server, 4)
        refusal = await client.post(CHAT_PATH, json=CHAT | {"n": 3})
        call.leave()
        await call.task
        return refusal

    message = error_of(server.run(main), 429)["message"]
    assert "4 choices are waiting and 3 more are asked, at most 6 may" in message


def test_too_many_waiting_prompt_tokens_are_429(make_server: MakeServer) -> None:
    server = make_server(silent, max_waiting_tokens=30)
    body = {"model": "tiny", "prompt": [5] * 20}

    async def main(client: httpx.AsyncClient) -> httpx.Response:
        call = OpenCall(server, COMPLETION_PATH, body)
        await wait_open(server, 1)
        refusal = await client.post(COMPLETION_PATH, json=body)
        assert server.context.admission.num_waiting == 1
        call.leave()
        await call.task
        return refusal

    assert "20 prompt tokens are waiting" in error_of(server.run(main), 429)["message"]


def test_an_idle_server_takes_a_request_above_its_queue_limits(make_server: MakeServer) -> None:
    server = make_server(max_queued_requests=1, max_waiting_tokens=1)
    assert server.complete(prompt=["hello", "there"], n=3).status_code == 200
    assert server.context.admission.waiting_tokens == 0


@pytest.mark.parametrize("fields", [{"n": 5}, {"n": 3, "prompt": ["a", "b"]}])
def test_more_choices_than_allowed_are_400(make_server: MakeServer, fields: dict[str, Any]) -> None:
    server = make_server(max_choices=4)
    error = error_of(server.complete(**fields), 400)
    assert error["param"] == "n"
    assert "max_choices" in error["message"]


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
def test_without_an_engine_generations_are_503(server: Server, path: str) -> None:
    server.engine.info = None
    response = server.post(path, CHAT)
    assert error_of(response, 503)["code"] == "engine_not_ready"
    assert response.headers["retry-after"] == "1"
    error_of(server.post("/tokenize", {"prompt": "a"}), 503)


def test_draining_refuses_new_requests_and_lets_open_ones_end(make_server: MakeServer) -> None:
    server = make_server(silent)

    async def main(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        call = OpenCall(server, CHAT_PATH, CHAT)
        await wait_open(server, 1)
        server.context.state.start_draining()
        response = await client.post(CHAT_PATH, json=CHAT)
        assert error_of(response, 503)["code"] == "draining"
        idle = asyncio.ensure_future(server.context.state.wait_idle())
        await asyncio.sleep(0)
        assert not idle.done()
        server.engine.feed(finished(server.engine.submitted[0], FinishReason.LENGTH, 0))
        await idle
        await call.task
        return [call.sent.get_nowait() for _ in range(2)]

    start, _ = server.run(main)
    assert start["status"] == 200


def test_one_log_line_per_request_without_text(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = make_server()
    server.chat(messages=[{"role": "user", "content": "private"}])
    (record,) = [r for r in caplog.records if r.name == "server.http.middleware.request_log"]
    fields = record.__dict__["fields"]
    assert fields["route"] == "POST /v1/chat/completions"
    assert (fields["status"], fields["finish_reason"]) == (200, "stop")
    assert fields["output_tokens"] == len(server.ids("hello there")) + 1
    assert fields["prompt_tokens"] == len(server.engine.submitted[0].prompt_ids)
    assert "private" not in caplog.text
    assert "hello" not in caplog.text


def test_texts_are_logged_on_request(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    make_server(log_prompts=True).complete(prompt="private")
    (record,) = [r for r in caplog.records if r.name == "server.http.middleware.request_log"]
    assert record.__dict__["fields"]["prompt"] == "private"
    assert record.__dict__["fields"]["output"] == "hello there"
