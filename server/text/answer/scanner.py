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
        self._held = ""
        firsts = {marker[0] for marker in [*markers, line_marker] if marker}
        self._plain = re.compile(f"[^{re.escape(SPACE + ''.join(sorted(firsts)))}]*")

    def plain(self, text: str, begin: int) -> int:
        """Where the text from `begin` on first has a letter that must be pushed."""
        if self._held or self._is_after_call:
            return begin
        found = self._plain.match(text, begin)
        assert found is not None
        self._begins_line = self._begins_line and found.end() == begin
        return found.end()

    def push(self, letter: str) -> Found:
        """Take the next letter."""
        self._held += letter
        released = ""
        while self._held:
            rest = self._held.lstrip(self._space)
            space = self._held[: len(self._held) - len(rest)]
            if rest in self._markers or (rest and self._opens_line(rest, space)):
                self._held = ""
                return Found(released, space, rest)
            if any(marker.startswith(rest) for marker in self._markers):
                break  # it is the begin of a marker, or there is only space
            if not rest:
                break
            cut = len(space) + 1
            released += self._held[:cut]
            self._held = self._held[cut:]
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
        held, self._held = self._held, ""
        return "" if self._is_after_call and not held.strip(self._space) else held

    def _opens_line(self, rest: str, space: str) -> bool:
        return rest == self._line_marker and (self._begins_line or "\n" in space)
