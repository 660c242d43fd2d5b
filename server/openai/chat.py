"""POST /v1/chat/completions."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from server.http.docs import Routes, operation
from server.http.sse import event
from server.openai.answer import Task, answer
from server.openai.bodies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatReply,
    ChatTokenLogprob,
)
from server.openai.choice import ChoiceDelta
from server.openai.convert import chat_params, chat_prompts
from server.openai.generation import Generation
from server.openai.logprobs import chat_logprobs
from server.openai.schema import ChatRequest

router = APIRouter()
ROUTES = Routes(router, (ChatRequest,), (ChatCompletion, ChatChunk))


@router.post("/v1/chat/completions", **operation(ChatRequest, ChatCompletion, streams=True))
async def create_chat_completion(http: HttpRequest) -> Response:
    """Continue a conversation."""
    return await answer(http, TASK)


class ChatWriter:
    """Writes the deltas of a generation as chat objects. A stream has, for each choice, a chunk
    with the role, chunks with content and a chunk with the finish reason; then, if the client
    asked for totals, a chunk with them."""

    def __init__(self, generation: Generation, body: ChatRequest) -> None:
        self._generation = generation
        self._scored = body.num_logprobs is not None
        self._with_usage = body.include_usage
        self._with_drafts = body.include_draft_stats
        self._opened = False
        self._texts: list[list[str]] = [[] for _ in generation.choices]
        self._scores: list[list[ChatTokenLogprob]] = [[] for _ in generation.choices]

    def events(self, delta: ChoiceDelta) -> bytes:
        head = b"" if self._opened else self._openings()
        self._opened = True
        return head + self._delta_events(delta)

    def last_events(self) -> bytes:
        return event(self._totals()) if self._with_usage or self._with_drafts else b""

    def add(self, delta: ChoiceDelta) -> None:
        self._texts[delta.index].append(delta.text)
        self._scores[delta.index] += chat_logprobs(self._generation.tokenizer, delta.scored)

    def whole(self) -> ChatCompletion:
        generation = self._generation
        return ChatCompletion(
            id=generation.id,
            created=generation.created,
            model=generation.model,
            system_fingerprint=generation.fingerprint,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=ChatReply(content="".join(self._texts[choice.index])),
                    logprobs=self._logprobs(self._scores[choice.index]),
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
                logprobs=self._logprobs(chat_logprobs(self._generation.tokenizer, delta.scored)),
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

    def _logprobs(self, scores: list[ChatTokenLogprob]) -> ChatLogprobs | None:
        return ChatLogprobs(content=scores) if self._scored else None


TASK = Task(ChatRequest, "chatcmpl", chat_prompts, chat_params, ChatWriter)
