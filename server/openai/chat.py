"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing

import msgspec
from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from server.http.body import read_body
from server.http.context import context_of
from server.http.docs import operation
from server.http.request_log import record_of
from server.http.sse import EventStream, WholeJson, event
from server.openai.bodies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatReply,
)
from server.openai.choice import ChoiceDelta, ScoredToken
from server.openai.convert import chat_params, chat_prompt
from server.openai.generation import Generation, start_generation
from server.openai.logprobs import chat_logprobs
from server.openai.schema import ChatRequest

router = APIRouter()


@router.post("/v1/chat/completions", **operation(ChatRequest, ChatCompletion, streams=True))
async def create_chat_completion(http: HttpRequest) -> Response:
    """Continue a conversation."""
    context, record = context_of(http), record_of(http.scope)
    context.admission.check_open()
    body = await read_body(http, ChatRequest)
    context.check_model(body.model)
    with ExitStack() as stack:
        ticket = context.admission.admit(body.num_choices)
        stack.callback(ticket.release)
        info = context.engine_info()
        prompt = await context.in_pool(chat_prompt, context, info, body)
        params = chat_params(body, prompt, info)
        generation = start_generation(
            context, record, ticket, body, [prompt], [params], info, "chatcmpl"
        )
        stack.pop_all()  # the response closes the generation, and that the ticket
    writer = ChatWriter(generation, body)
    if body.stream:
        return EventStream(writer.events(), generation.close)
    return WholeJson(writer.whole, generation.close)


class ChatWriter:
    """Puts the deltas of a generation into chat objects."""

    def __init__(self, generation: Generation, body: ChatRequest) -> None:
        self._generation = generation
        self._scored = body.num_logprobs is not None
        self._with_usage = body.include_usage
        self._with_drafts = body.include_draft_stats

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream: a chunk with the role for each choice, then chunks with content, one
        without content at the end of each choice, and the totals that were asked for."""
        opened = False
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                head = b"" if opened else self._openings()
                opened = True
                data = head + self._delta_events(delta)
                if data:
                    yield data
        if self._with_usage or self._with_drafts:
            yield event(self._totals())

    async def whole(self) -> ChatCompletion:
        """The reply in one piece."""
        generation = self._generation
        texts: list[list[str]] = [[] for _ in generation.choices]
        scored: list[list[ScoredToken]] = [[] for _ in generation.choices]
        async for delta in generation.deltas():
            texts[delta.index].append(delta.text)
            scored[delta.index].extend(delta.scored)
        return ChatCompletion(
            id=generation.id,
            created=generation.created,
            model=generation.model,
            system_fingerprint=generation.fingerprint,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=ChatReply(content="".join(texts[choice.index])),
                    logprobs=self._logprobs(scored[choice.index]),
                    finish_reason=choice.ended(),
                )
                for choice in generation.choices
            ],
            usage=generation.usage(),
            speculation=generation.draft_stats() if self._with_drafts else UNSET,
        )

    def _openings(self) -> bytes:
        role = ChatDelta(role="assistant", content="")
        numbers = range(len(self._generation.choices))
        return b"".join(
            event(self._chunk([ChatChunkChoice(index=index, delta=role)])) for index in numbers
        )

    def _delta_events(self, delta: ChoiceDelta) -> bytes:
        data = b""
        if delta.text or delta.scored:
            content = ChatChunkChoice(
                index=delta.index,
                delta=ChatDelta(content=delta.text),
                logprobs=self._logprobs(delta.scored),
            )
            data = event(self._chunk([content]))
        if delta.finish_reason is not None:
            end = ChatChunkChoice(
                index=delta.index, delta=ChatDelta(), finish_reason=delta.finish_reason
            )
            data += event(self._chunk([end]))
        return data

    def _totals(self) -> ChatChunk:
        """The last chunk of a stream."""
        return msgspec.structs.replace(
            self._chunk([]),
            usage=self._generation.usage() if self._with_usage else UNSET,
            speculation=self._generation.draft_stats() if self._with_drafts else UNSET,
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        generation = self._generation
        return ChatChunk(
            id=generation.id,
            created=generation.created,
            model=generation.model,
            system_fingerprint=generation.fingerprint,
            choices=choices,
            usage=None if self._with_usage else UNSET,
        )

    def _logprobs(self, scored: Sequence[ScoredToken]) -> ChatLogprobs | None:
        return chat_logprobs(self._generation.tokenizer, scored) if self._scored else None
