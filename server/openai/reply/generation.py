"""The choices of one HTTP request, generated together."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from configs.resolve import HostConfig
from engine.messages import EngineInfo, ErrorCode, Finished, Tokens
from engine.request import FinishReason, Request, SamplingParams
from server.http.admission.queue import Ticket
from server.http.context import ServerContext
from server.http.errors import ApiError, invalid, server_error, unavailable
from server.http.middleware.callers import Caller
from server.http.middleware.request_log import RequestRecord
from server.http.reply.inbox import Event, Inbox
from server.openai.inputs.convert import Prompt, cache_salt, stream_options, with_seed_of_choice
from server.openai.reply.bodies import ReplyMetrics, SpeculationStats, Usage
from server.openai.reply.choice import Choice, ChoiceDelta
from server.openai.reply.spans import describe_generation
from server.openai.reply.usage import count_drafts, count_so_far, count_tokens, draft_metrics
from server.openai.request.schema import SamplingFields
from server.text.answer.forms import Reading

# Why the engine refuses a request -> the code of the client's error.
REFUSALS = {
    ErrorCode.CONTEXT_LENGTH: "context_length_exceeded",
    ErrorCode.INVALID: None,
    ErrorCode.REFUSED: "request_refused",
}


class Shortcut(Protocol):
    """Takes deltas at once, in place of a task that waits for them."""

    @property
    def is_open(self) -> bool:
        """Whether it takes one now."""
        ...

    def take(self, delta: ChoiceDelta) -> None: ...


class Generation:
    """Choice `p * n + i` is choice i of prompt p. `close` must always be called."""

    def __init__(
        self,
        context: ServerContext,
        record: RequestRecord,
        ticket: Ticket,
        id: str,
        prompts: Sequence[Prompt],
        choices: list[Choice],
    ) -> None:
        self.id = id
        self.created = int(time.time())
        self.model = context.info.model_name
        self.fingerprint = context.info.fingerprint
        self.tokenizer = context.tokenizer
        self.prompts = prompts
        self.choices = choices
        self._client = context.client
        self._admission = context.admission
        self._metrics = context.metrics
        self._record = record
        self._ticket = ticket
        self._keeps_text = context.config.log.prompts
        self._output: list[str] = []
        self._closed = False

    def prompt_of(self, index: int) -> Prompt:
        """The prompt that a choice continues."""
        return self.prompts[index // (len(self.choices) // len(self.prompts))]

    async def deltas(self, shortcut: Shortcut | None = None) -> AsyncGenerator[ChoiceDelta, None]:
        """Submit all choices and yield their deltas, interleaved as they come. Those of a single
        choice may go to `shortcut` instead, while nothing is yielded.

        Raises:
            ApiError: the engine could not finish a choice; the others are aborted by `close`.
        """
        streams = [self._client.submit(choice.request) for choice in self.choices]
        if shortcut is not None and len(streams) == 1 and isinstance(streams[0], Inbox):
            streams[0].shortcut = functools.partial(self._shorten, shortcut)
        async with contextlib.aclosing(_merge(streams)) as events:
            async for index, event in events:
                choice = self.choices[index]
                if isinstance(event, Tokens):
                    delta = self._take_tokens(choice, event)
                else:
                    delta = self._take_finished(choice, event)
                if delta is not None:
                    yield delta

    def usage_so_far(self) -> Usage:
        """Tokens of all choices up to now, without details."""
        return count_so_far(self.prompts, self.choices)

    def usage_of_prompts(self) -> Usage:
        """Tokens before the first output, without details."""
        return count_so_far(self.prompts, ())

    def usage(self) -> Usage:
        """Tokens of all choices; all of them must have ended."""
        return count_tokens(self.prompts, self.choices)

    def draft_stats(self) -> SpeculationStats:
        """Draft statistics of all choices; all of them must have ended."""
        return count_drafts(self.choices)

    def draft_metrics(self) -> ReplyMetrics | None:
        """The same in the form of vLLM; None if nothing was drafted."""
        return draft_metrics(self.choices)

    def close(self) -> None:
        """Abort what still runs, leave the queue, complete the log record. May be repeated."""
        if self._closed:
            return
        self._closed = True
        for choice in self.choices:
            if choice.live:
                self._abort(choice)
            if choice.finished is None:
                choice.abandon()
            if choice.finish_reason is None:
                self._record.error = self._record.error or "the client disconnected"
        self._metrics.end([choice.num_output for choice in self.choices])
        self._ticket.release()
        self._complete_record()

    def _complete_record(self) -> None:
        """Note in the request's record, and in its span, what came of it."""
        self._record.finish_reasons = [
            str(choice.finish_reason or FinishReason.ABORT.value) for choice in self.choices
        ]
        if self._record.span is not None:
            describe_generation(
                self._record.span, self.id, self.model, len(self.prompts), self.choices
            )
        self._record.output_tokens = sum(choice.num_output for choice in self.choices)
        if self._keeps_text:
            self._record.output = "".join(self._output)

    def _shorten(self, shortcut: Shortcut, event: Event) -> bool:
        """Hand the delta of an event on, if that takes no time."""
        if not isinstance(event, Tokens) or event.logprobs or not shortcut.is_open:
            return False
        if event.prompt_logprobs is not None or event.pooled is not None:
            return False
        delta = self._take_tokens(self.choices[0], event)
        if delta is not None:
            shortcut.take(delta)
        return True

    def _take_tokens(self, choice: Choice, event: Tokens) -> ChoiceDelta | None:
        if not choice.started:
            self._ticket.leave(choice.index)
        ended_before = choice.finish_reason is not None
        delta = choice.take_tokens(event)
        if choice.live and (ended_before or choice.stopped_by_text):
            self._abort(choice)
        return self._noted(delta)

    def _take_finished(self, choice: Choice, event: Finished) -> ChoiceDelta | None:
        self._ticket.leave(choice.index)
        failed = event.reason in (FinishReason.ERROR, FinishReason.ABORT)
        if failed and choice.finish_reason is None:
            choice.fail(event)
            error = self._failure(event)
            self._record.error = event.error or "aborted by the engine"
            raise error
        return self._noted(choice.take_finished(event))

    def _noted(self, delta: ChoiceDelta | None) -> ChoiceDelta | None:
        if self._keeps_text and delta is not None:
            self._output.append(delta.text)
        return delta

    def _failure(self, event: Finished) -> ApiError:
        """The client's error for an engine's error; it shows the engine's message only if that is
        about the request."""
        if event.error_code is ErrorCode.STOPPING:
            return self._admission.draining()
        if event.error_code in REFUSALS and event.error is not None:
            return invalid(event.error, code=REFUSALS[event.error_code])
        if event.error_code is ErrorCode.TRANSFER:
            return unavailable(
                "The prompt's pages could not be sent to the engine that decodes; the request can "
                "be sent again",
                "handover_failed",
                retry_after=1,
            )
        if event.error_code is ErrorCode.UNSOUND:
            return server_error(
                "The model gave NaN or infinite scores for the next token, so this request cannot "
                "be finished; other requests go on"
            )
        return server_error("The engine failed to finish this request; it can be sent again")

    def _abort(self, choice: Choice) -> None:
        choice.aborted = True
        self._client.abort(choice.request.request_id)


@dataclass(frozen=True, slots=True)
class Admitted:
    """An HTTP request in the queue: whose it is, its log record and its place."""

    caller: Caller
    record: RequestRecord
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class GenerationInputs:
    """What the engine requests of one HTTP request are made of."""

    id_prefix: str
    body: SamplingFields
    prompts: Sequence[Prompt]
    params: Sequence[SamplingParams]  # one per prompt
    reading: Reading


def start_generation(
    context: ServerContext, info: EngineInfo, admitted: Admitted, inputs: GenerationInputs
) -> Generation:
    """Make the engine requests of an HTTP request.

    Raises:
        ApiError: 429; too many prompt tokens are waiting.
    """
    body, prompts = inputs.body, inputs.prompts
    admitted.ticket.add_prompts([len(prompt.token_ids) for prompt in prompts], body.num_choices)
    id = f"{inputs.id_prefix}{uuid.uuid4().hex}"
    options = stream_options(body, info, inputs.reading.marks)
    choices = [
        Choice(
            request.choice,
            request,
            context.tokenizer,
            options,
            context.metrics,
            inputs.reading.reader(prompt.text or ""),
        )
        for prompt, request in _engine_requests(context.config, admitted.caller, inputs, id)
    ]
    context.metrics.ask(body.num_choices, [each.max_tokens for each in inputs.params])
    _note_prompts(context.config, admitted.record, prompts)
    if body.min_draft_nodes and info.draft is None:
        admitted.record.not_used.append("speculation.min_nodes")
    return Generation(context, admitted.record, admitted.ticket, id, prompts, choices)


def _engine_requests(
    config: HostConfig, caller: Caller, inputs: GenerationInputs, id: str
) -> Iterator[tuple[Prompt, Request]]:
    """One request for each choice of each prompt, with its prompt. All arrive at the same time."""
    body, now = inputs.body, time.time()
    salt = cache_salt("" if config.cache.share_between_clients else caller.label, body.cache_salt)
    index = itertools.count()
    for prompt, params in zip(inputs.prompts, inputs.params, strict=True):
        for number in range(body.num_choices):
            choice = next(index)
            yield (
                prompt,
                Request(
                    request_id=f"{id}-{choice}",
                    prompt_ids=prompt.token_ids,
                    params=with_seed_of_choice(params, number),
                    choice=choice,
                    priority=body.priority or 0,
                    client=caller.label,
                    cache_salt=salt,
                    session=body.prompt_cache_key or "",
                    max_draft_nodes=body.max_draft_nodes,
                    min_draft_nodes=body.min_draft_nodes,
                    prediction=prompt.prediction,
                    trace=body.include_trace,
                    arrival_time=now,
                ),
            )


def _note_prompts(config: HostConfig, record: RequestRecord, prompts: Sequence[Prompt]) -> None:
    """Note in a request's record what it asks, and whether its prediction has no effect."""
    off = config.speculation.lookup is False
    if off and prompts[0].prediction and "prediction" not in record.not_used:
        record.not_used.append("prediction")
    record.prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    if config.log.prompts:
        record.prompt = "\n".join(prompt.text or str(prompt.token_ids) for prompt in prompts)


async def _merge(
    streams: Sequence[AsyncIterator[Event]],
) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of all streams as they come, with the number of their stream."""
    if len(streams) == 1:
        async for event in streams[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(len(streams))
    tasks = [asyncio.create_task(_pump(*pair, queue)) for pair in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            index, item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int,
    stream: AsyncIterator[Event],
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]],
) -> None:
    """Move one stream into the queue; None marks its end, an exception its failure."""
    end: BaseException | None = None
    try:
        async for event in stream:
            await queue.put((index, event))
    except Exception as error:  # noqa: BLE001  # raised again by `_merge`
        end = error
    await queue.put((index, end))
