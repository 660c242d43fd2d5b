"""One choice of a reply: turns engine events into text, logprobs and a finish reason."""

from __future__ import annotations

import bisect
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from engine.messages import DraftSource, Finished, Round, TokenLogprob, Tokens
from engine.request import FinishReason, Request
from server.http.monitoring.metrics import Metrics
from server.openai.reply import bodies
from server.text.answer.parts import AnswerReader, Part
from server.text.output.stream import StreamOptions, TextStream
from server.text.tokens.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token's logprob and where its text begins, in characters of the choice."""

    offset: int
    logprob: TokenLogprob


@dataclass(frozen=True, slots=True)
class OriginToken:
    """Who drafted a token, and at which depth of the tree; None and 0 for the target's own."""

    offset: int  # where its text begins, in characters of the choice
    token_id: int
    source: DraftSource | None
    depth: int


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """New output of a choice. `finish_reason` is set in its last delta only."""

    index: int
    text: str
    parts: Sequence[Part]  # of the text, as far as it is known what they are
    scored: Sequence[ScoredToken]
    finish_reason: bodies.FinishReason | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    pooled: bytes | None = None  # see `Tokens`
    token_ids: Sequence[int] = ()  # those since the last delta, the one that ended the choice too
    origins: Sequence[OriginToken] = ()  # of a request with a trace
    rounds: Sequence[Round] = ()  # those since the last delta


END = sys.maxsize  # after every character
Item = TypeVar("Item", ScoredToken, OriginToken)


class _Held(Generic[Item]):
    """What is said of tokens whose text has not been sent yet."""

    def __init__(self) -> None:
        self._items: list[Item] = []

    def add(self, items: Iterable[Item]) -> None:
        self._items += items

    def release(self, end: int) -> Sequence[Item]:
        """Remove and return the leading ones whose text begins before character `end`."""
        count = 0
        while count < len(self._items) and self._items[count].offset < end:
            count += 1
        released, self._items = self._items[:count], self._items[count:]
        return released


class Choice:
    """Follows one engine request. Logprobs and origins are sent with the text of their tokens; a
    token that a stop string or stop token keeps out of the text has none."""

    def __init__(
        self,
        index: int,
        request: Request,
        tokenizer: Tokenizer,
        options: StreamOptions,
        metrics: Metrics,
        reader: AnswerReader,
    ) -> None:
        self.index = index
        self.request = request
        self.num_output = 0  # tokens up to and including the one that ended the choice
        self.finish_reason: bodies.FinishReason | None = None
        self.finished: Finished | None = None  # the engine's last event
        self.aborted = False  # whether the engine was told to stop
        self._stream = TextStream(tokenizer, request.prompt_ids, options)
        self._metrics = metrics
        self._reader = reader
        self._begins: list[int] = []  # of the text of tokens that may be reasoning
        self._emitted = 0  # characters
        self._scored: _Held[ScoredToken] = _Held()
        self._origins: _Held[OriginToken] = _Held()
        self._unsent: list[int] = []  # tokens since the last delta
        self._rounds: list[Round] = []  # the same of rounds
        self._newest: float | None = None  # time of the last tokens
        self._answered = False  # its first tokens were counted

    @property
    def started(self) -> bool:
        """Whether its first tokens have arrived."""
        return self._newest is not None

    @property
    def stopped_by_text(self) -> bool:
        """Whether a stop string or its last call ended it; the engine does not know that yet."""
        return isinstance(self._stream.stop, str) or self._reader.end is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it, if one did."""
        return self._stream.stop if isinstance(self._stream.stop, str) else None

    @property
    def stop_reason(self) -> bodies.StopReason:
        """The stop string, or the stop token of the request, that ended it."""
        stop = self._stream.stop
        is_own_end = isinstance(stop, int) and stop not in self.request.params.stop_token_ids
        return None if is_own_end else stop

    @property
    def num_thought(self) -> int:
        """How many letters of its text so far are reasoning, with its markers."""
        return self._reader.num_thought

    @property
    def num_reasoning(self) -> int:
        """Tokens of its reasoning."""
        return bisect.bisect_left(self._begins, self._reader.num_thought)

    @property
    def has_called(self) -> bool:
        """Whether it called tools, and did not end inside the arguments of the last call."""
        return self._reader.has_called

    @property
    def live(self) -> bool:
        """Whether the engine is still generating it and was not told to stop."""
        return self.finished is None and not self.aborted

    def ended(self) -> bodies.FinishReason:
        """Why it ended. Call it only after the end."""
        assert self.finish_reason is not None
        return self.finish_reason

    def take_tokens(self, event: Tokens) -> ChoiceDelta | None:
        """Take new tokens. None when there is nothing to send; tokens after a stop are ignored."""
        if self.finish_reason is not None:
            return None
        self._measure(len(event.token_ids))
        taken = self._stream.push(event.token_ids)
        parts = self._read(taken.text, taken.offsets, taken.stop is not None)
        end = self._reader.end
        offsets = [offset for offset in taken.offsets if end is None or offset < end]
        self.num_output += len(offsets)
        self._unsent += event.token_ids[: len(offsets)]
        self._hold(event, offsets)
        scored = self._scored.release(self._emitted)
        if taken.stop is not None or end is not None:
            self.finish_reason = "stop"
        elif self._is_at_limit:
            rest, last, further = self._end(stopped=False)
            return self._delta(taken.text + rest, [*parts, *last], [*scored, *further], event)
        ended = self.finish_reason is not None
        if not (taken.text or scored or ended or event.prompt_logprobs or event.pooled):
            return None
        return self._delta(taken.text, parts, scored, event)

    def take_finished(self, event: Finished) -> ChoiceDelta | None:
        """Take the engine's last event. None when its tokens had already ended the choice."""
        self.finished = event
        if self.finish_reason is None:
            delta = self._delta(*self._end(stopped=event.reason is FinishReason.STOP))
        else:
            delta = None
        self._measure_end(event, self.ended())
        return delta

    @property
    def _is_at_limit(self) -> bool:
        """Whether the engine ends it by length here, so that the delta of its last tokens can say
        so. Only the engine knows where a grammar ends it."""
        params = self.request.params
        return params.grammar is None and 0 < params.max_tokens <= self.num_output

    def _end(self, stopped: bool) -> tuple[str, Sequence[Part], Sequence[ScoredToken]]:
        """End it; returns what was held back. `stopped`: it is complete; else its tokens are as
        many as there may be."""
        text = self._stream.finish()
        stopped = stopped or self._stream.stop is not None
        parts = self._read(text, (), ends=True, cut=not stopped)
        self.finish_reason = "stop" if stopped or self.stopped_by_text else "length"
        if self._stream.stop is None:
            self._emitted = END
        return text, parts, self._scored.release(self._emitted)

    def fail(self, event: Finished) -> None:
        """The engine ended it by an error or an abort."""
        self.finished = event
        self._measure_end(event, event.reason.value)

    def abandon(self) -> None:
        """The client left before the engine was done."""
        seen = Finished(
            self.request.request_id,
            FinishReason.ABORT,
            len(self.request.prompt_ids),
            self.num_output,
        )
        self._measure_end(seen, self.finish_reason or FinishReason.ABORT.value)

    def _delta(
        self,
        text: str,
        parts: Sequence[Part],
        scored: Sequence[ScoredToken],
        event: Tokens | None = None,
    ) -> ChoiceDelta:
        ids, self._unsent = self._unsent, []
        rounds, self._rounds = self._rounds, []
        origins = self._origins.release(self._emitted)
        return ChoiceDelta(
            self.index,
            text,
            parts,
            scored,
            self.finish_reason,
            None if event is None else event.prompt_logprobs,
            None if event is None else event.pooled,
            ids,
            origins,
            rounds,
        )

    def _hold(self, event: Tokens, offsets: Sequence[int]) -> None:
        """Keep what is said of the first tokens, those with an offset: an end cuts the others."""
        if event.logprobs is not None:
            known = event.logprobs[: len(offsets)]
            self._scored.add(ScoredToken(*pair) for pair in zip(offsets, known, strict=True))
        if event.round is not None:
            self._rounds.append(event.round)
            self._origins.add(_origins(event.token_ids, event.round, offsets))

    def _read(
        self, text: str, offsets: Sequence[int], ends: bool, cut: bool = False
    ) -> Sequence[Part]:
        """The parts of new text, and of what was held back if it ends."""
        if self._reader.may_think:
            self._begins += offsets
        parts = self._reader.feed(text)
        self._emitted += len(text)
        return [*parts, *self._reader.finish(cut)] if ends else parts

    def _measure(self, num_tokens: int) -> None:
        now = time.time()
        if self._newest is None:
            if num_tokens:  # not for prompts that ask for no token, such as those of embeddings
                seconds, self._answered = max(now - self.request.arrival_time, 0), True
                self._metrics.first_tokens(num_tokens, seconds, len(self.request.prompt_ids))
        elif num_tokens:
            self._metrics.next_tokens(num_tokens, max(now - self._newest, 0))
        self._newest = now

    def _measure_end(self, event: Finished, reason: str) -> None:
        self._metrics.finish(event, reason, self.request.arrival_time, self._answered)


def _origins(
    token_ids: Sequence[int], round: Round, offsets: Sequence[int]
) -> Iterator[OriginToken]:
    """The accepted nodes come first, one depth after the other."""
    for at, (offset, token_id) in enumerate(zip(offsets, token_ids[: len(offsets)], strict=True)):
        drafted = at < len(round.path)
        yield OriginToken(
            offset, token_id, round.source if drafted else None, at + 1 if drafted else 0
        )
