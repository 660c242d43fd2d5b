"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from server.http.routes.openapi import Routes, operation
from server.openai.inputs.conversion import CHAT
from server.openai.inputs.convert import chat_reading
from server.openai.reply.answer import Task, answer
from server.openai.reply.bodies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFinishReason,
    ChatTokenLogprob,
    PromptScores,
    TokenIds,
)
from server.openai.reply.choice import Choice, ChoiceDelta
from server.openai.reply.generation import Generation
from server.openai.reply.logprobs import chat_logprobs, prompt_scores
from server.openai.reply.message import Message
from server.openai.reply.report import Report
from server.openai.reply.trace import TraceWriter
from server.openai.request.schema import ChatRequest
from server.text.answer.parts import Content

router = APIRouter()
ROUTES = Routes(router, (ChatRequest,), (ChatCompletion, ChatChunk))


@router.post("/v1/chat/completions", **operation(ChatRequest, ChatCompletion, streams=True))
async def create_chat_completion(http: HttpRequest) -> Response:
    """Continue a conversation."""
    return await answer(http, TASK)


class ChatWriter:
    """Writes the deltas of a generation as chat objects. A stream has, for each choice, a chunk
    with the role, then chunks with reasoning, content or calls, of which the last has the finish
    reason, if it has no call; then, if the client asked for totals, a chunk with them."""

    def __init__(self, generation: Generation, body: ChatRequest) -> None:
        self._generation = generation
        self._report = Report(generation, body, ChatChunk)
        self._names_ids = bool(body.return_tokens_as_token_ids)
        self._with_ids = bool(body.return_token_ids)
        scored = body.num_logprobs is not None
        # As OpenAI: the answer to a request that names its tool just stops.
        called: ChatFinishReason = "stop" if body.names_a_tool else "tool_calls"
        thoughts = body.include_reasoning is not False
        self._messages = [Message(scored, called, thoughts) for _ in generation.choices]
        tokenizer, traced = generation.tokenizer, body.include_trace
        self._traces = [TraceWriter(tokenizer, traced) for _ in generation.choices]
        self._num_prompt_tops = body.prompt_logprobs
        self._prompt_scores: PromptScores | None = None
        self._echoed = body.echoed
        for message in self._messages:
            message.add_parts([Content(self._echoed)])
        self._opened = False

    def events(self, delta: ChoiceDelta) -> bytes:
        head = b"" if self._opened else self._openings()
        self._opened = True
        return head + self._delta_events(delta)

    def last_events(self) -> bytes:
        return self._report.last()

    def add(self, delta: ChoiceDelta) -> None:
        message = self._messages[delta.index]
        message.add_tokens(self._scores_of(delta), delta.token_ids)
        message.add_parts(delta.parts)
        self._traces[delta.index].add(delta)
        if delta.prompt_logprobs is not None and self._num_prompt_tops is not None:
            self._prompt_scores = prompt_scores(
                self._generation.tokenizer, delta.prompt_logprobs, self._num_prompt_tops
            )

    def whole(self) -> ChatCompletion:
        choices = [
            self._whole_choice(choice, message)
            for choice, message in zip(self._generation.choices, self._messages, strict=True)
        ]
        return self._report.whole(
            ChatCompletion,
            choices=choices,
            prompt_token_ids=self._if_asked(self._prompt_ids(), None),
            prompt_logprobs=self._prompt_scores,
        )

    def _whole_choice(self, choice: Choice, message: Message) -> ChatChoice:
        scores, ids = message.take_tokens()
        return ChatChoice(
            index=choice.index,
            message=message.whole(),
            logprobs=scores,
            finish_reason=message.finish_reason(choice.ended(), choice.has_called),
            stop_reason=choice.stop_reason,
            token_ids=self._if_asked(ids, None),
            trace=self._traces[choice.index].take(),
        )

    def _openings(self) -> bytes:
        role = ChatDelta(role="assistant", content="")
        events = []
        for index in range(len(self._generation.choices)):
            first = UNSET if index else self._if_asked(self._prompt_ids(), UNSET)
            choice = ChatChunkChoice(index=index, delta=role)
            events.append(self._report.opening([choice], prompt_token_ids=first))
            if self._echoed:
                echo = ChatChunkChoice(index=index, delta=ChatDelta(content=self._echoed))
                events.append(self._report.opening([echo]))
        return b"".join(events)

    def _delta_events(self, delta: ChoiceDelta) -> bytes:
        """A chunk for each part of the message, and one with the finish reason. Log-probabilities,
        token ids and the trace go with the first part that follows them."""
        message = self._messages[delta.index]
        message.add_tokens(self._scores_of(delta), delta.token_ids)
        self._traces[delta.index].add(delta)
        parts = list(message.deltas(delta.parts))
        if delta.finish_reason is None:
            return b"".join(self._event(message, delta.index, part) for part in parts)
        reason = message.finish_reason(
            delta.finish_reason, self._generation.choices[delta.index].has_called
        )
        *parts, last = parts or [ChatDelta(content="" if delta.scored else UNSET)]
        if last.tool_calls is not UNSET:  # some clients take a call and the end of all apart
            parts, last = [*parts, last], ChatDelta()
        events = [self._event(message, delta.index, part) for part in parts]
        return b"".join([*events, self._event(message, delta.index, last, reason)])

    def _event(
        self,
        message: Message,
        index: int,
        delta: ChatDelta,
        reason: ChatFinishReason | None = None,
    ) -> bytes:
        scores, ids = message.take_tokens()
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=scores if scores is None or scores.content else None,
            finish_reason=reason,
            stop_reason=self._generation.choices[index].stop_reason if reason else UNSET,
            token_ids=self._if_asked(ids, UNSET),
            trace=self._traces[index].take(),
        )
        return self._report.chunk([choice])

    def _prompt_ids(self) -> list[int]:
        return self._generation.prompts[0].token_ids

    def _if_asked(self, token_ids: Sequence[int], otherwise: UnsetType | None) -> TokenIds:
        return list(token_ids) if self._with_ids else otherwise

    def _scores_of(self, delta: ChoiceDelta) -> list[ChatTokenLogprob]:
        return chat_logprobs(self._generation.tokenizer, delta.scored, self._names_ids)


TASK = Task(ChatRequest, "chatcmpl-", CHAT, ChatWriter, chat_reading)
