"""Which tokens a sequence has seen, kept as flat arrays so that penalties need no Python loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class TokenHistory:
    """Distinct tokens of one sequence with their counts in the output.

    Grows by one entry per new distinct token; `ids` and `counts` are views, not copies.
    """

    def __init__(self, prompt_ids: Iterable[int], output_ids: Iterable[int]) -> None:
        distinct = list(dict.fromkeys(prompt_ids))
        self._index = {token: place for place, token in enumerate(distinct)}
        self._ids = np.array(distinct, dtype=np.int64)
        self._counts = np.zeros(len(distinct), dtype=np.int64)
        self.extend(output_ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Count tokens that were committed to the output."""
        for token in token_ids:
            place = self._index.setdefault(token, len(self._index))
            if place >= len(self._ids):
                self._grow()
            self._ids[place] = token
            self._counts[place] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """[U] distinct tokens of prompt and output."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> NDArray[np.int64]:
        """[U] how often each occurs in the output; 0 for tokens of the prompt only."""
        return self._counts[: len(self._index)]

    def along(self, path: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`ids` and `counts` as they would be after the tokens of `path`."""
        if not path:
            return self.ids, self.counts
        counts = self.counts.copy()
        new: dict[int, int] = {}
        for token in path:
            place = self._index.get(token)
            if place is None:
                new[token] = new.get(token, 0) + 1
            else:
                counts[place] += 1
        ids = np.concatenate((self.ids, np.array(list(new), dtype=np.int64)))
        return ids, np.concatenate((counts, np.array(list(new.values()), dtype=np.int64)))

    def _grow(self) -> None:
        room = max(64, len(self._ids))
        self._ids = np.concatenate((self._ids, np.zeros(room, dtype=np.int64)))
        self._counts = np.concatenate((self._counts, np.zeros(room, dtype=np.int64)))
