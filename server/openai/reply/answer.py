"""How every generating route answers: it admits the request to the queue, starts the generation and
sends a stream or a whole reply."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from server.http.admission.lanes import LONG, Turns
from server.http.connection.direct_line import DirectLine, line_of
from server.http.context import ServerContext, context_of
from server.http.errors import ApiError
from server.http.middleware.request_log import record_of
from server.http.reply.sse import DONE, EventStream, WholeJson, error_event
from server.http.request.body import read_body
from server.openai.inputs.conversion import Asked, Conversion
from server.openai.inputs.defaults import with_model_defaults
from server.openai.reply.choice import ChoiceDelta
from server.openai.reply.generation import Admitted, Generation, GenerationInputs, start_generation
from server.text.answer.forms import Reading

FEW_SCORES = 64

Result = TypeVar("Result")


class Writer(Protocol):
    """Writes the deltas of one generation as the objects of a route."""

    def events(self, delta: ChoiceDelta) -> bytes:
        """Stream events for this delta; may be empty."""
        ...

    def last_events(self) -> bytes:
        """Stream events after the end of all choices; may be empty."""
        ...

    def add(self, delta: ChoiceDelta) -> None:
        """Keep this delta for `whole`."""
        ...

    def whole(self) -> msgspec.Struct:
        """The reply in one piece, once all choices have ended."""
        ...


@dataclass(frozen=True, slots=True)
class Task(Generic[Asked]):
    """What differs between the routes."""

    body: type[Asked]
    id_prefix: str
    conversion: Conversion[Asked]
    writer: Callable[[Generation, Asked], Writer]
    reading: Callable[[ServerContext, Asked], Reading]
    failure: Callable[[Any, ApiError], bytes] = lambda _, error: error_event(error)  # by the writer
    end: bytes = DONE  # of a stream
    most_sequences: Literal["max_choices", "max_embeddings"] = "max_choices"  # in `server`


async def answer(http: HttpRequest, task: Task[Asked]) -> Response:
    """The response to a request whose body is the task's."""
    context_of(http).admission.check_open()
    return await respond(http, task, await read_body(http, task.body))


async def respond(http: HttpRequest, task: Task[Asked], body: Asked) -> Response:
    """The response to a checked body. It releases the places in the queue by closing the
    generation."""
    context = context_of(http)
    generation, writer = await begin(http, task, body)
    if body.stream:
        events = _events(context, generation, writer, line_of(http.scope))
        failure = functools.partial(task.failure, writer)
        return EventStream(events, generation.close, failure, task.end)
    return WholeJson(lambda: whole(context, generation, writer), generation.close)


async def begin(http: HttpRequest, task: Task[Asked], body: Asked) -> tuple[Generation, Writer]:
    """A generation that was not submitted yet, and what writes it. If anything fails, the places
    in the queue are released."""
    context, record = context_of(http), record_of(http.scope)
    context.check_model(body.model)
    caller = context.callers.of(http.scope["headers"])
    caller.check_priority(body.priority or 0)
    body = with_model_defaults(body, context.info.defaults)
    with ExitStack() as stack:
        ticket = context.admission.admit(body.num_sequences, task.most_sequences)
        stack.callback(ticket.release)
        info = context.engine_info()
        prompts, params = await task.conversion.inputs(http, info, body)
        reading = task.reading(context, body)
        generation = start_generation(
            context,
            info,
            Admitted(caller, record, ticket),
            GenerationInputs(task.id_prefix, body, prompts, params, reading),
        )
        writer = task.writer(generation, body)
        stack.pop_all()
    return generation, writer


@dataclass(frozen=True, slots=True)
class _ToLine:
    """A `Shortcut` for a stream."""

    writer: Writer
    line: DirectLine

    @property
    def is_open(self) -> bool:
        return self.line.is_open

    def take(self, delta: ChoiceDelta) -> None:
        if data := self.writer.events(delta):
            self.line.write(data)


@dataclass(frozen=True, slots=True)
class _ToWriter:
    """A `Shortcut` for a reply in one piece."""

    writer: Writer
    is_open = True

    def take(self, delta: ChoiceDelta) -> None:
        self.writer.add(delta)


async def _events(
    context: ServerContext, generation: Generation, writer: Writer, line: DirectLine | None
) -> AsyncGenerator[bytes, None]:
    turns = Turns()
    shortcut = None if line is None else _ToLine(writer, line)
    async with aclosing(generation.deltas(shortcut)) as deltas:
        async for delta in deltas:
            if data := await _written(context, delta, writer.events):
                yield data
            await turns.give()
    if data := writer.last_events():
        yield data


async def whole(context: ServerContext, generation: Generation, writer: Writer) -> msgspec.Struct:
    """The reply in one piece."""
    turns = Turns()
    async with aclosing(generation.deltas(_ToWriter(writer))) as deltas:
        async for delta in deltas:
            await _written(context, delta, writer.add)
            await turns.give()
    return writer.whole()


async def _written(
    context: ServerContext, delta: ChoiceDelta, write: Callable[[ChoiceDelta], Result]
) -> Result:
    """What `write` makes of a delta. Many scores, as those of a whole prompt, take long, as do
    vectors."""
    num_scores = len(delta.scored) + len(delta.prompt_logprobs or ())
    if num_scores <= FEW_SCORES and delta.pooled is None:
        return write(delta)
    return await context.in_pool(LONG, write, delta)
