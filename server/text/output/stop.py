"""Find stop strings in a text that arrives in pieces."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopScan:
    """Result of one piece of text. After a match the matcher must not be used again."""

    text: str  # safe to emit now
    stop: str | None = None  # the stop string that was found


class StopStringMatcher:
    """Holds back text that could begin a stop string; ends at the stop string completed first (of
    several completed by one character, at the longest).

    How the text is split into pieces does not matter. Each stop string has a Knuth-Morris-Pratt
    automaton: the work per character does not depend on the text.
    """

    def __init__(self, stops: tuple[str, ...], include_in_output: bool = False) -> None:
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        ordered = sorted(set(stops), key=len, reverse=True)
        self._automata = [_Automaton(stop) for stop in ordered]
        self._include = include_in_output
        self._held = ""

    def feed(self, text: str, armed: bool = True) -> StopScan:
        """Take the next piece of text; return the text that can be emitted now. A stop string
        counts only if the piece that completes it is `armed`; it may begin in one that is not."""
        if not self._automata:
            return StopScan(text)
        begin = len(self._held)
        self._held += text
        for end in range(begin, len(self._held)):
            hit = self._advance(self._held[end])
            if hit is not None and armed:
                return StopScan(self._cut(end + 1, hit), hit)
        return StopScan(self._release(max(automaton.open for automaton in self._automata)))

    def flush(self) -> str:
        """The text still held back. Call it after the last piece."""
        held, self._held = self._held, ""
        return held

    def _advance(self, letter: str) -> str | None:
        hits = [automaton.stop for automaton in self._automata if automaton.advance(letter)]
        return hits[0] if hits else None  # longest first

    def _cut(self, end: int, stop: str) -> str:
        emitted = self._held[: end if self._include else end - len(stop)]
        self._held = ""
        return emitted

    def _release(self, keep: int) -> str:
        border = len(self._held) - keep
        released, self._held = self._held[:border], self._held[border:]
        return released


class _Automaton:
    """Tracks how much of one stop string the end of the text matches."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._fallback = _borders(stop)

    @property
    def open(self) -> int:
        """Characters at the end of the text that may begin the stop string."""
        return self._fallback[-1] if self.matched == len(self.stop) else self.matched

    def advance(self, letter: str) -> bool:
        """Take one letter; True when it completes the stop string."""
        self.matched = self.open  # the end of an ignored match may begin the next one
        while self.matched and self.stop[self.matched] != letter:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self.stop[self.matched] == letter
        return self.matched == len(self.stop)


def _borders(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = borders[length - 1]
        length += stop[index] == stop[length]
        borders[index] = length
    return borders
