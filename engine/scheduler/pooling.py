"""Final hidden states of prompts whose requests want them, while their chunks are computed."""

from __future__ import annotations

from array import array
from typing import Literal

from engine.request import Sequence

FLOAT32: Literal["f"] = "f"


class Pools:
    """Sums of hidden states by request. Plain Python: there is one sum for each chunk of a prompt,
    so this takes much less time than the chunk."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, seq: Sequence, chunk: bytes) -> None:
        """Add the sum of a chunk, float32 [H]."""
        states: list[float] = array(FLOAT32, chunk).tolist()
        known = self._sums.get(seq.request_id)
        if known is not None:
            states = [one + other for one, other in zip(known, states, strict=True)]
        self._sums[seq.request_id] = states

    def take(self, seq: Sequence) -> bytes | None:
        """The state that the request wants, once its prompt is computed; None if it wants none."""
        found = self._sums.pop(seq.request_id, None)
        if found is None:
            return None
        divisor = seq.num_prompt if seq.request.params.pooling == "mean" else 1
        return array(FLOAT32, [value / divisor for value in found]).tobytes()

    def forget(self, seq: Sequence) -> None:
        """The request ended, or its prompt will be computed again."""
        self._sums.pop(seq.request_id, None)
