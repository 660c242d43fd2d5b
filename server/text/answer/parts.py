"""The parts of an answer, and what reads them out of its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself, before its content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of the function `name` begins; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """Further text of the arguments, a JSON object, of the newest call."""

    text: str


Part = Content | Reasoning | CallBegin | CallArguments


class AnswerReader(Protocol):
    """Reads the text of one answer as it comes. The joined parts do not depend on how the text is
    split into pieces."""

    @property
    def has_called(self) -> bool:
        """Whether there are calls, and the text did not end inside the last one's arguments."""
        ...

    @property
    def may_think(self) -> bool:
        """Whether text that comes next may be reasoning."""
        ...

    @property
    def num_thought(self) -> int:
        """How many of the letters fed so far are reasoning, with its markers."""
        ...

    @property
    def end(self) -> int | None:
        """How many letters the answer has, once nothing after them counts."""
        ...

    def feed(self, text: str) -> Sequence[Part]:
        """The parts that this text completes; it may be held back."""
        ...

    def finish(self, cut: bool = False) -> Sequence[Part]:
        """The rest, after the last text. `cut`: the token limit ended it, so that what looks like
        the beginning of a call is one."""
        ...


class PlainReader:
    """Takes all text for content."""

    has_called = False
    may_think = False
    num_thought = 0
    end: int | None = None

    def feed(self, text: str) -> Sequence[Part]:
        return [Content(text)] if text else []

    def finish(self, cut: bool = False) -> Sequence[Part]:  # noqa: ARG002  (all is content)
        return []


class PartList:
    """Collects parts; neighbours of one kind are joined."""

    def __init__(self) -> None:
        self._kinds: list[type[Part]] = []
        self._texts: list[list[str]] = []

    def add(self, kind: type[Part], text: str) -> None:
        """Add text of a kind of part. A call always begins a part of its own."""
        if not text:
            return
        if self._kinds and self._kinds[-1] is kind and kind is not CallBegin:
            self._texts[-1].append(text)
        else:
            self._kinds.append(kind)
            self._texts.append([text])

    def take(self) -> list[Part]:
        """All parts since the last `take`."""
        pairs = zip(self._kinds, self._texts, strict=True)
        parts = [kind("".join(texts)) for kind, texts in pairs]
        self._kinds, self._texts = [], []
        return parts
