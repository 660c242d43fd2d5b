"""How a route that generates answers, whatever its objects look like: from the request to its place
in the queue, the generation, and the stream or the whole reply."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from engine.messages import EngineInfo
from engine.request import SamplingParams
from server.http.body import read_body
from server.http.context import ServerContext, context_of
from server.http.request_log import record_of
from server.http.sse import EventStream, WholeJson
from server.openai.choice import ChoiceDelta
from server.openai.convert import Prompt
from server.openai.generation import Generation, start_generation
from server.openai.schema import SamplingFields

Asked = TypeVar("Asked", bound=SamplingFields)


class Writer(Protocol):
    """Puts the deltas of one generation into the objects of a route."""

    def events(self, delta: ChoiceDelta) -> bytes:
        """The events of a stream that are due now; there may be none."""
        ...

    def last_events(self) -> bytes:
        """Those after the end of all choices; there may be none."""
        ...

    def add(self, delta: ChoiceDelta) -> None:
        """Keep it for `whole`."""
        ...

    def whole(self) -> msgspec.Struct:
        """The reply in one piece, once all choices have ended."""
        ...


@dataclass(frozen=True, slots=True)
class Task(Generic[Asked]):
    """What one route does in its own way."""

    body: type[Asked]
    id_prefix: str
    prompts: Callable[[ServerContext, EngineInfo, Asked], list[Prompt]]  # off the event loop
    params: Callable[[Asked, Prompt, EngineInfo], SamplingParams]
    writer: Callable[[Generation, Asked], Writer]


async def answer(http: HttpRequest, task: Task[Asked]) -> Response:
    """The response to a request. Whatever fails before there is one gives the places in the queue
    back; the response closes the generation, and that gives them back."""
    context, record = context_of(http), record_of(http.scope)
    context.admission.check_open()
    body = await read_body(http, task.body)
    context.check_model(body.model)
    with ExitStack() as stack:
        ticket = context.admission.admit(body.num_sequences)
        stack.callback(ticket.release)
        info = context.engine_info()
        prompts = await context.in_pool(task.prompts, context, info, body)
        params = [task.params(body, prompt, info) for prompt in prompts]
        generation = start_generation(
            context, record, ticket, body, prompts, params, info, task.id_prefix
        )
        writer = task.writer(generation, body)
        stack.pop_all()
    if body.stream:
        return EventStream(_events(generation, writer), generation.close)
    return WholeJson(lambda: _whole(generation, writer), generation.close)


async def _events(generation: Generation, writer: Writer) -> AsyncGenerator[bytes, None]:
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if data := writer.events(delta):
                yield data
    if data := writer.last_events():
        yield data


async def _whole(generation: Generation, writer: Writer) -> msgspec.Struct:
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            writer.add(delta)
    return writer.whole()
