"""Finds markers in a text that arrives letter by letter."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

SPACE = string.whitespace


@dataclass(frozen=True, slots=True)
class Found:
    """Text that holds no marker, and then perhaps one, with the space before it."""

    text: str = ""
    space: str = ""
    marker: str = ""


NOTHING = Found()


class MarkerScanner:
    """Holds back only what may become a marker, and the space before it, so that this space can be
    left out."""

    def __init__(self, markers: Sequence[str], line_marker: str = "") -> None:
        """`line_marker` is a letter that is a marker at the start of a line only."""
        self._markers = markers
        self._line_marker = line_marker
        self._space = SPACE
        self._begins_line = True
        self._is_after_call = False  # and nothing but space has followed
        self._gap: list[str] = []  # space that is held back; an answer may be nothing else
        self._gap_breaks = False  # it has a line break
        self._rest = ""  # what is held back after it
        firsts = {marker[0] for marker in [*markers, line_marker] if marker}
        self._plain = re.compile(f"[^{re.escape(SPACE + ''.join(sorted(firsts)))}]*")

    def plain(self, text: str, begin: int) -> int:
        """Where the text from `begin` on first has a letter that must be pushed."""
        if self._gap or self._rest or self._is_after_call:
            return begin
        found = self._plain.match(text, begin)
        assert found is not None
        self._begins_line = self._begins_line and found.end() == begin
        return found.end()

    def push(self, letter: str) -> Found:
        """Take the next letter."""
        self._rest += letter
        released = ""
        while self._skip_space():
            if self._rest in self._markers or self._opens_line():
                marker, self._rest = self._rest, ""
                return Found(released, self._take_gap(), marker)
            if any(marker.startswith(self._rest) for marker in self._markers):
                break  # it is the begin of a marker
            released += self._take_gap() + self._rest[0]
            self._rest = self._rest[1:]
            self.resume()
        return Found(released) if released else NOTHING

    def restart(self, separators: str) -> None:
        """Go on after a call: the next one may begin at once, and `separators` count as space until
        other text comes."""
        self._space = SPACE + separators
        self._begins_line = self._is_after_call = True

    def resume(self) -> None:
        """Go on after other text."""
        self._space = SPACE
        self._begins_line = self._is_after_call = False

    def finish(self) -> str:
        """The text still held back; call it after the last letter. Space after the last call is no
        text."""
        is_space = self._is_after_call and not self._rest
        held, self._rest = self._take_gap() + self._rest, ""
        return "" if is_space else held

    def _skip_space(self) -> str:
        """What is held back after space."""
        rest = self._rest.lstrip(self._space)
        if len(rest) < len(self._rest):
            self._gap.append(self._rest[: len(self._rest) - len(rest)])
            self._gap_breaks = self._gap_breaks or "\n" in self._gap[-1]
            self._rest = rest
        return rest

    def _take_gap(self) -> str:
        gap = "".join(self._gap)
        self._gap.clear()
        self._gap_breaks = False
        return gap

    def _opens_line(self) -> bool:
        is_mark = self._rest == self._line_marker
        return is_mark and (self._begins_line or self._gap_breaks)
