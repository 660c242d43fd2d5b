"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing

import msgspec
from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from engine.messages import TokenLogprob
from server.http.body import read_body
from server.http.context import context_of
from server.http.docs import operation
from server.http.request_log import record_of
from server.http.sse import EventStream, WholeJson, event
from server.openai.bodies import Completion, CompletionChoice
from server.openai.choice import Choice, ChoiceDelta
from server.openai.convert import completion_params, completion_prompts
from server.openai.generation import Generation, start_generation
from server.openai.logprobs import CompletionLogprobsWriter, Echo, echo_of
from server.openai.schema import CompletionRequest

router = APIRouter()


@router.post("/v1/completions", **operation(CompletionRequest, Completion, streams=True))
async def create_completion(http: HttpRequest) -> Response:
    """Continue one or several prompts."""
    context, record = context_of(http), record_of(http.scope)
    context.admission.check_open()
    body = await read_body(http, CompletionRequest)
    context.check_model(body.model)
    with ExitStack() as stack:
        ticket = context.admission.admit(body.num_choices * len(body.prompts()))
        stack.callback(ticket.release)
        info = context.engine_info()
        prompts = await context.in_pool(completion_prompts, context, info, body)
        params = [completion_params(body, prompt, info) for prompt in prompts]
        generation = start_generation(context, record, ticket, body, prompts, params, info, "cmpl")
        stack.pop_all()  # the response closes the generation, and that the ticket
    writer = CompletionWriter(generation, body)
    if body.stream:
        return EventStream(writer.events(), generation.close)
    return WholeJson(writer.whole, generation.close)


class CompletionWriter:
    """Puts the deltas of a generation into completion objects."""

    def __init__(self, generation: Generation, body: CompletionRequest) -> None:
        self._generation = generation
        self._with_usage = body.include_usage
        self._with_drafts = body.include_draft_stats
        self._choices = [_ChoiceWriter(generation, choice, body) for choice in generation.choices]

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream: chunks with text, the last of each choice with its finish reason, and the
        totals that were asked for."""
        usage = None if self._with_usage else UNSET
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                writer = self._choices[delta.index]
                writer.add(delta)
                if writer.has_news:
                    yield event(self._object([writer.take()], usage))
        if self._with_usage or self._with_drafts:
            yield event(self._with_totals([], self._with_usage))

    async def whole(self) -> Completion:
        """The reply in one piece."""
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                self._choices[delta.index].add(delta)
        return self._with_totals([writer.take() for writer in self._choices], True)

    def _with_totals(self, choices: list[CompletionChoice], with_usage: bool) -> Completion:
        return msgspec.structs.replace(
            self._object(choices, UNSET),
            usage=self._generation.usage() if with_usage else UNSET,
            speculation=self._generation.draft_stats() if self._with_drafts else UNSET,
        )

    def _object(self, choices: list[CompletionChoice], usage: UnsetType | None) -> Completion:
        generation = self._generation
        return Completion(
            id=generation.id,
            created=generation.created,
            model=generation.model,
            system_fingerprint=generation.fingerprint,
            choices=choices,
            usage=usage,
        )


class _ChoiceWriter:
    """Text and logprobs of one choice that were not sent yet, the echoed prompt in front."""

    def __init__(self, generation: Generation, choice: Choice, body: CompletionRequest) -> None:
        self._choice = choice
        self._echo: Echo | None = None
        self._width = 0  # characters in front of the generated text
        if body.echo:
            prompt = generation.prompt_of(choice.index)
            skips = body.skip_special_tokens is not False
            self._echo = echo_of(generation.tokenizer, prompt.token_ids, prompt.text, skips)
            self._width = len(self._echo.text)
        scored = body.logprobs is not None
        self._logprobs = CompletionLogprobsWriter(generation.tokenizer) if scored else None
        self._texts: list[str] = []
        self._news = False
        self._ended = False

    @property
    def has_news(self) -> bool:
        return self._news

    def add(self, delta: ChoiceDelta) -> None:
        if self._echo is not None:
            self._add_echo(self._echo, delta.prompt_logprobs)
            self._echo = None
        self._texts.append(delta.text)
        if self._logprobs is not None:
            for item in delta.scored:
                entry = item.logprob
                self._logprobs.add(entry.token_id, self._width + item.offset, entry)
        self._ended = delta.finish_reason is not None
        self._news = self._news or bool(delta.text or delta.scored or self._ended)

    def take(self) -> CompletionChoice:
        """What was added since the last `take`."""
        text, self._texts, self._news = "".join(self._texts), [], False
        return CompletionChoice(
            index=self._choice.index,
            text=text,
            logprobs=None if self._logprobs is None else self._logprobs.take(),
            finish_reason=self._choice.ended() if self._ended else None,
        )

    def _add_echo(self, echo: Echo, scores: list[TokenLogprob | None] | None) -> None:
        self._texts.append(echo.text)
        self._news = True
        if self._logprobs is not None:
            token_ids = self._choice.request.prompt_ids
            entries = scores if scores is not None else [None] * len(token_ids)
            for token_id, offset, entry in zip(token_ids, echo.offsets, entries, strict=True):
                self._logprobs.add(token_id, offset, entry)
