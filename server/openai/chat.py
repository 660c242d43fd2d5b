"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from server.http.docs import Routes, operation
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
from server.openai.report import Report
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
        self._report = Report(generation, body, ChatChunk)
        self._scored = body.num_logprobs is not None
        self._names_ids = bool(body.return_tokens_as_token_ids)
        self._with_ids = bool(body.return_token_ids)
        self._opened = False
        self._texts: list[list[str]] = [[] for _ in generation.choices]
        self._scores: list[list[ChatTokenLogprob]] = [[] for _ in generation.choices]
        self._ids: list[list[int]] = [[] for _ in generation.choices]

    def events(self, delta: ChoiceDelta) -> bytes:
        head = b"" if self._opened else self._openings()
        self._opened = True
        return head + self._delta_events(delta)

    def last_events(self) -> bytes:
        return self._report.last()

    def add(self, delta: ChoiceDelta) -> None:
        self._texts[delta.index].append(delta.text)
        self._scores[delta.index] += self._scores_of(delta)
        self._ids[delta.index].extend(delta.token_ids)

    def whole(self) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=choice.index,
                message=ChatReply(content="".join(self._texts[choice.index])),
                logprobs=self._logprobs(self._scores[choice.index]),
                finish_reason=choice.ended(),
                token_ids=self._if_asked(self._ids[choice.index]),
            )
            for choice in self._generation.choices
        ]
        return self._report.whole(
            ChatCompletion, choices=choices, prompt_token_ids=self._prompt_ids()
        )

    def _openings(self) -> bytes:
        role = ChatDelta(role="assistant", content="")
        events = []
        for index in range(len(self._generation.choices)):
            first = UNSET if index else self._prompt_ids()
            choice = ChatChunkChoice(index=index, delta=role)
            events.append(self._report.chunk([choice], prompt_token_ids=first))
        return b"".join(events)

    def _delta_events(self, delta: ChoiceDelta) -> bytes:
        """A chunk with the text, and one with the finish reason. Token ids go with the text."""
        data, ids = b"", self._if_asked(delta.token_ids)
        if delta.text or delta.scored:
            content = ChatChunkChoice(
                index=delta.index,
                delta=ChatDelta(content=delta.text),
                logprobs=self._logprobs(self._scores_of(delta)),
                token_ids=ids,
            )
            data = self._report.chunk([content])
            ids = self._if_asked(())
        if delta.finish_reason is not None:
            end = ChatChunkChoice(
                index=delta.index,
                delta=ChatDelta(),
                finish_reason=delta.finish_reason,
                token_ids=ids,
            )
            data += self._report.chunk([end])
        return data

    def _prompt_ids(self) -> list[int] | UnsetType:
        return self._if_asked(self._generation.prompts[0].token_ids)

    def _if_asked(self, token_ids: Sequence[int]) -> list[int] | UnsetType:
        return list(token_ids) if self._with_ids else UNSET

    def _scores_of(self, delta: ChoiceDelta) -> list[ChatTokenLogprob]:
        return chat_logprobs(self._generation.tokenizer, delta.scored, self._names_ids)

    def _logprobs(self, scores: list[ChatTokenLogprob]) -> ChatLogprobs | None:
        return ChatLogprobs(content=scores) if self._scored else None


TASK = Task(ChatRequest, "chatcmpl", chat_prompts, chat_params, ChatWriter)
