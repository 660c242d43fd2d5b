"""Where the newest tokens of a text stood before."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

LENGTHS = (2, 3, 4, 6, 8, 12)  # of matches that are told apart
WIDTH = 4  # bytes of a token


class TokenText:
    """The tokens of one sequence as bytes, so that a search runs at the speed of memory and nothing
    has to be indexed: a few microseconds for a thousand tokens."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __len__(self) -> int:
        return len(self._bytes) // WIDTH

    def follow(self, token_ids: Sequence[int]) -> None:
        """Take in what came behind the tokens known so far."""
        self._bytes += array("i", token_ids[len(self) :]).tobytes()

    def longest_match(self) -> tuple[int, int]:
        """The most of the newest tokens that stood together before, one of `LENGTHS` (0: none), and
        the place behind where they stood last."""
        found = (0, 0)
        for length in LENGTHS:
            if length >= len(self):
                break
            at = self._last_place_of(self._bytes[-length * WIDTH :])
            if at < 0:
                break
            found = (length, at + length)
        return found

    def continued(self, place: int, count: int) -> list[int]:
        """The `count` tokens from `place` on; where the text ends, its repetition goes on."""
        here = array("i", bytes(self._bytes[place * WIDTH : (place + count) * WIDTH])).tolist()
        while len(here) < count:
            here.append(here[len(here) - (len(self) - place)])
        return here

    def _last_place_of(self, pattern: bytearray) -> int:
        """Of whole tokens, the newest one left out; -1 if there is none."""
        at = self._bytes.rfind(pattern, 0, len(self._bytes) - WIDTH)
        while at >= 0 and at % WIDTH:  # begins inside a token
            at = self._bytes.rfind(pattern, 0, at + len(pattern) - 1)
        return at // WIDTH if at >= 0 else -1
