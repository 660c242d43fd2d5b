"""Splits the reasoning off the start of an answer: <think>...</think>."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from server.text.answer.parts import AnswerReader, Part, PartList, Reasoning
from server.text.answer.scanner import SPACE, MarkerScanner

OPEN, CLOSE = "<think>", "</think>"
MARKS = (OPEN, CLOSE)


class _Place(enum.Enum):
    START = "start"  # only space so far
    BEFORE_THOUGHT = "before thought"  # only space after the opening mark
    THOUGHT = "thought"
    BEFORE_CONTENT = "before content"  # only space after the closing mark
    CONTENT = "content"


class ThinkingReader:
    """Reasoning stands at the start of an answer. Space around it is left out. What follows is read
    by another reader."""

    def __init__(self, after: AnswerReader, is_open: bool) -> None:
        """`is_open`: the prompt ends with the opening mark."""
        self._after = after
        self._place = _Place.BEFORE_THOUGHT if is_open else _Place.START
        self._opening = MarkerScanner([OPEN])
        self._closing = MarkerScanner([CLOSE])
        self._parts = PartList()
        self._length = 0  # letters fed so far
        self._num_thought = 0  # of them, once the reasoning has ended
        self._num_before = 0  # of them, those that the other reader does not get

    @property
    def has_called(self) -> bool:
        return self._after.has_called

    @property
    def may_think(self) -> bool:
        return self._place is not _Place.CONTENT

    @property
    def num_thought(self) -> int:
        is_open = self._place in (_Place.BEFORE_THOUGHT, _Place.THOUGHT)
        return self._length if is_open else self._num_thought

    @property
    def end(self) -> int | None:
        end = self._after.end
        return None if end is None else self._num_before + end

    def feed(self, text: str) -> Sequence[Part]:
        begin, after = 0, ""
        while begin < len(text) and self._place is not _Place.CONTENT:
            thinks = self._place is _Place.THOUGHT
            end = self._closing.plain(text, begin) if thinks else begin
            self._parts.add(Reasoning, text[begin:end])
            self._length += max(end - begin, 1)
            if end == begin:
                after = self._push(text[begin])
                end += 1
            begin = end
        self._length += len(text) - begin
        return [*self._parts.take(), *self._after.feed(after + text[begin:])]

    def finish(self, cut: bool = False) -> Sequence[Part]:
        self._parts.add(Reasoning, self._closing.finish())
        held = self._after.feed(self._opening.finish())
        return [*self._parts.take(), *held, *self._after.finish(cut)]

    def _push(self, letter: str) -> str:
        """Take a letter; return text that is for the other reader."""
        match self._place:
            case _Place.START:
                return self._look_for_thought(letter)
            case _Place.BEFORE_CONTENT:
                return self._begin_content(letter) if letter not in SPACE else ""
            case _Place.BEFORE_THOUGHT if letter in SPACE:
                return ""
        self._place = _Place.THOUGHT
        found = self._closing.push(letter)
        self._parts.add(Reasoning, found.text)
        if found.marker:
            self._num_thought = self._length
            self._place = _Place.BEFORE_CONTENT
        return ""

    def _look_for_thought(self, letter: str) -> str:
        found = self._opening.push(letter)
        if found.marker:
            self._place = _Place.BEFORE_THOUGHT
        return self._begin_content(found.text) if found.text else ""

    def _begin_content(self, text: str) -> str:
        self._place = _Place.CONTENT
        self._num_before = self._length - len(text)
        return text
