"""Predicted outputs: a text of which the client expects that the answer repeats it, perhaps with
changes, such as a file that the model is asked to edit. It is drafted where it goes on as the
answer did so far."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Tokens

WIDTH = 4  # bytes of a token
SURE = 4  # tokens: so many in a row are found wherever they stand in the prediction
NEAR = 2  # tokens: so many are found where the prediction is expected to go on
WINDOW = 64  # tokens after the last place that count as near


class Prediction:
    """How far the answer of one sequence has come in its prediction."""

    def __init__(self, token_ids: Tokens[int]) -> None:
        self._expected = array("i", token_ids)
        self._bytes = self._expected.tobytes()
        self._num_followed = 0  # output tokens
        self._newest: list[int] = []  # the last of them
        self._place: int | None = 0  # where the prediction goes on; None: it is not known
        self._anchor = 0  # the last known place
        self._run = 0  # tokens that were as expected, in a row

    @property
    def is_sure(self) -> bool:
        """Whether the newest tokens are those of the prediction, for some while."""
        return self._run >= SURE

    def follow(self, token_ids: Tokens[int], num_prompt: int) -> None:
        """Take the output tokens of a sequence, those after the ones known so far."""
        for token in token_ids[num_prompt + self._num_followed :]:
            self._take(token)

    def rest(self, most: int) -> list[int]:
        """The next tokens of the prediction, at most so many; empty if the place is not known."""
        if self._place is None:
            return []
        return self._expected[self._place : self._place + most].tolist()

    def _take(self, token: int) -> None:
        self._num_followed += 1
        self._newest = [*self._newest[1 - SURE :], token]
        place = self._place
        if place is not None and self._expected[place : place + 1].tolist() == [token]:
            self._place, self._anchor, self._run = place + 1, place + 1, self._run + 1
            return
        self._run = 0
        self._place = self._found()
        if self._place is not None:
            self._anchor = self._place

    def _found(self) -> int | None:
        """The place after the newest tokens in the prediction."""
        if len(self._newest) >= SURE:
            for begin, end in ((self._anchor, None), (0, None)):
                place = self._place_of(self._newest, begin, end)
                if place is not None:
                    return place
        if len(self._newest) < NEAR:
            return None
        begin = max(self._anchor - NEAR, 0)
        return self._place_of(self._newest[-NEAR:], begin, self._anchor + WINDOW)

    def _place_of(self, pattern: Tokens[int], begin: int, end: int | None) -> int | None:
        """The place after the first occurrence of a pattern from `begin` on."""
        wanted = array("i", pattern).tobytes()
        last = len(self._bytes) if end is None else end * WIDTH
        at = self._bytes.find(wanted, begin * WIDTH, last)
        while at >= 0 and at % WIDTH:  # starts inside a token
            at = self._bytes.find(wanted, at + 1, last)
        return at // WIDTH + len(pattern) if at >= 0 else None
