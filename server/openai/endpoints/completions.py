"""POST /v1/completions."""

from __future__ import annotations

import math

import msgspec
from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from engine.messages import TokenLogprob
from server.http.routes.openapi import Routes, operation
from server.openai.inputs.conversion import Conversion
from server.openai.inputs.convert import completion_params, completion_prompts
from server.openai.inputs.echo import Echo
from server.openai.reply.answer import Task, answer
from server.openai.reply.bodies import Completion, CompletionChoice, PromptScores
from server.openai.reply.choice import Choice, ChoiceDelta
from server.openai.reply.generation import Generation
from server.openai.reply.logprobs import CompletionLogprobsWriter, prompt_scores
from server.openai.reply.report import Report
from server.openai.reply.trace import TraceWriter
from server.openai.request.schema import CompletionRequest
from server.openai.request.structured import asked_grammar
from server.text.answer.forms import Reading

router = APIRouter()
ROUTES = Routes(router, (CompletionRequest,), (Completion,))


@router.post("/v1/completions", **operation(CompletionRequest, Completion, streams=True))
async def create_completion(http: HttpRequest) -> Response:
    """Continue one or several prompts."""
    return await answer(http, TASK)


class CompletionWriter:
    """Writes the deltas of a generation as completion objects. A stream has chunks with text, the
    last one of each choice with its finish reason; then, if the client asked for totals, a chunk
    with them."""

    def __init__(self, generation: Generation, body: CompletionRequest) -> None:
        self._report = Report(generation, body, Completion)
        self._choices = [_ChoiceWriter(generation, choice, body) for choice in generation.choices]
        self._num_choices, self._num_returned = body.num_choices, body.num_returned

    def events(self, delta: ChoiceDelta) -> bytes:
        writer = self._choices[delta.index]
        writer.add(delta)
        return self._report.chunk([writer.take(delta.index)]) if writer.has_news else b""

    def last_events(self) -> bytes:
        return self._report.last()

    def add(self, delta: ChoiceDelta) -> None:
        self._choices[delta.index].add(delta)

    def whole(self) -> Completion:
        choices = [writer.take(index) for index, writer in enumerate(self._returned())]
        return self._report.whole(Completion, choices=choices, kv_transfer_params=None)

    def _returned(self) -> list[_ChoiceWriter]:
        """The choices of the reply: of those of a prompt, the likeliest."""
        found: list[_ChoiceWriter] = []
        for begin in range(0, len(self._choices), self._num_choices):
            of_prompt = self._choices[begin : begin + self._num_choices]
            if self._num_returned < self._num_choices:
                of_prompt = sorted(of_prompt, key=lambda each: each.mean_logprob, reverse=True)
            found += of_prompt[: self._num_returned]
        return found


class _ChoiceWriter:
    """Collects the unsent text and logprobs of one choice, beginning with an echoed prompt."""

    def __init__(self, generation: Generation, choice: Choice, body: CompletionRequest) -> None:
        self._choice = choice
        self._echo = generation.prompt_of(choice.index).echo
        # Characters of the echoed prompt.
        self._width = 0 if self._echo is None else len(self._echo.text)
        scored = body.logprobs is not None
        as_ids = bool(body.return_tokens_as_token_ids)
        writer = CompletionLogprobsWriter(generation.tokenizer, as_ids)
        self._logprobs = writer if scored else None
        self._trace = TraceWriter(generation.tokenizer, body.include_trace)
        self._with_ids = bool(body.return_token_ids)
        self._ids: list[int] = []
        self._num_prompt_tops = body.prompt_logprobs
        # What fields have that were not asked for, see `TokenIds`.
        self._unasked: UnsetType | None = UNSET if body.stream else None
        self._prompt_scores: PromptScores | UnsetType | None = self._unasked
        self._tokenizer = generation.tokenizer
        self._num_echo_tops = body.logprobs or 0
        self._sum, self._num_scored = 0.0, 0
        self._opened = False
        self._texts: list[str] = []
        self._news = False
        self._ended = False

    @property
    def has_news(self) -> bool:
        return self._news

    @property
    def mean_logprob(self) -> float:
        """Of the tokens of the text; that of an empty text is the lowest."""
        return self._sum / self._num_scored if self._num_scored else -math.inf

    def add(self, delta: ChoiceDelta) -> None:
        if delta.prompt_logprobs is not None and self._num_prompt_tops is not None:
            self._prompt_scores = prompt_scores(
                self._tokenizer, delta.prompt_logprobs, self._num_prompt_tops
            )
        self._sum += sum(item.logprob.logprob for item in delta.scored)
        self._num_scored += len(delta.scored)
        if self._echo is not None:
            self._add_echo(self._echo, delta.prompt_logprobs)
            self._echo = None
        self._texts.append(delta.text)
        self._ids += delta.token_ids
        self._trace.add(delta)
        if self._logprobs is not None:
            for item in delta.scored:
                entry = item.logprob
                self._logprobs.add(entry.token_id, self._width + item.offset, entry)
        self._ended = delta.finish_reason is not None
        self._news = self._news or bool(delta.text or delta.scored or delta.origins or self._ended)

    def take(self, index: int) -> CompletionChoice:
        """What was added since the last `take`, as the choice of this number."""
        text, self._texts, self._news = "".join(self._texts), [], False
        ids, self._ids = self._ids, []
        prompt_ids = [] if self._opened else self._choice.request.prompt_ids
        self._opened = True
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=None if self._logprobs is None else self._logprobs.take(),
            finish_reason=self._choice.ended() if self._ended else None,
            stop_reason=self._choice.stop_reason if self._ended else UNSET,
            token_ids=ids if self._with_ids else self._unasked,
            prompt_token_ids=prompt_ids if self._with_ids and prompt_ids else self._unasked,
            trace=self._trace.take(),
            prompt_logprobs=self._prompt_scores,
        )

    def _add_echo(self, echo: Echo, scores: list[TokenLogprob | None] | None) -> None:
        self._texts.append(echo.text)
        self._news = True
        if self._logprobs is not None:
            token_ids = self._choice.request.prompt_ids
            entries = scores if scores is not None else [None] * len(token_ids)
            for token_id, offset, entry in zip(token_ids, echo.offsets, entries, strict=True):
                if entry is not None:
                    top = entry.top[: self._num_echo_tops]
                    entry = msgspec.structs.replace(entry, top=top)
                self._logprobs.add(token_id, offset, entry)


TASK = Task(
    CompletionRequest,
    "cmpl-",
    Conversion(completion_prompts, completion_params, lambda _, body: asked_grammar(body)),
    CompletionWriter,
    lambda *_: Reading(),
)
