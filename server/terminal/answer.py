"""An answer as it comes: pieces of text with their origins, and counts."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from server.terminal.chunks import Chunk, Delta, Trace, TracedRound, TracedToken

PLAIN = "bonus"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one origin: `bonus`, `draft`, `lookup` or `grammar`, at a depth of its tree."""

    text: str
    origin: str = PLAIN
    depth: int = 0


@dataclass(slots=True)
class Answer:
    """Takes the chunks of one stream. The trace is used where the server sends one."""

    clock: Callable[[], float] = time.perf_counter
    text: str = ""
    num_tokens: int = 0
    num_first: int = 0  # tokens of the first chunk with text
    first_at: float | None = None
    last_at: float = 0.0
    drafts: int = 0  # steps with a draft
    accepted: int = 0
    finish_reason: str | None = None
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def take(self, chunk: Chunk) -> Iterator[Piece]:
        """The new text."""
        if chunk.usage is not None and chunk.usage.completion_tokens is not None:
            self.num_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices or ():
            self.finish_reason = choice.finish_reason or self.finish_reason
            trace = choice.trace or Trace([], [])
            self._count(trace.rounds)
            delta = choice.delta or Delta()
            content, thought = delta.content or "", delta.reasoning_content or ""
            self.text += content
            if content or thought:
                self._time()  # before it is shown, which Ctrl-C may end
            pieces = [self._piece(token) for token in trace.tokens]
            yield from _fitting(pieces, content)
            if thought:
                yield Piece(thought, "reasoning")

    @property
    def speed(self) -> float | None:
        """Tokens per second after the first ones."""
        if self.first_at is None or self.last_at <= self.first_at:
            return None
        return (self.num_tokens - self.num_first) / (self.last_at - self.first_at)

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per step with a draft."""
        return 1 + self.accepted / self.drafts if self.drafts else None

    def facts(self) -> str:
        """Counts and speed in words."""
        parts = [f"{self.num_tokens} tokens"] if self.num_tokens else []
        if self.speed:
            parts.append(f"{self.speed:.0f} tokens/s")
        if self.acceptance_length is not None:
            parts.append(f"{self.acceptance_length:.2f} tokens per drafted step")
        if self.finish_reason == "length":
            parts.append("cut by the limit")
        return " · ".join(parts)

    def _piece(self, token: TracedToken) -> Piece:
        text = self._decoder.decode(bytes(token.bytes))
        return Piece(text, token.origin, token.depth)

    def _count(self, rounds: list[TracedRound]) -> None:
        drafted = [each for each in rounds if each.nodes]
        self.drafts += len(drafted)
        self.accepted += sum(len(each.accepted) for each in drafted)

    def _time(self) -> None:
        self.last_at = self.clock()
        if self.first_at is None:
            self.first_at, self.num_first = self.last_at, self.num_tokens


def _fitting(pieces: list[Piece], content: str) -> list[Piece]:
    """The tokens, if together they are the text: some tokenizers leave out a first space, and
    tokens of reasoning or calls are no part of it."""
    if "".join(piece.text for piece in pieces) == content:
        return pieces
    return [Piece(content)] if content else []
