"""Answers that are kept in memory for later requests, bounded in number and in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

OVERHEAD = 1024  # bytes of an answer besides its texts


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer, as JSON."""

    owner: str  # label of the caller, who alone may see it
    before: str | None  # id of the answer that it follows
    asked: bytes
    answer: bytes

    @property
    def num_bytes(self) -> int:
        return OVERHEAD + len(self.asked) + len(self.answer)


class KeptAnswers:
    """Forgets the answers that were not used for the longest time. To use an answer is to use all
    that it follows, so that an answer goes before those that it follows. Answers that are still
    being made stay, even if they need more than all room. Used only on the event loop's thread.

    Args:
        is_made: whether the answer of an id is still being made; `ended` must follow.
    """

    def __init__(
        self, max_answers: int, max_bytes: int, is_made: Callable[[str], bool] = lambda _: False
    ) -> None:
        self._max_answers = max_answers
        self._max_bytes = max_bytes
        self._is_made = is_made
        self._answers: OrderedDict[str, Kept] = OrderedDict()
        self._num_bytes = 0

    @property
    def is_open(self) -> bool:
        """Whether answers are kept at all."""
        return self._max_answers > 0

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._answers)

    def put(self, id: str, answer: Kept) -> None:
        """Keep an answer in the place of an earlier one of this id. One that is larger than all
        room is not kept, unless it is being made."""
        self._put(id, answer)
        self._make_room()

    def _put(self, id: str, answer: Kept) -> None:
        self._drop(id)
        too_large = answer.num_bytes > self._max_bytes
        if not self.is_open or (too_large and not self._is_made(id)):
            return
        self._answers[id] = answer
        self._num_bytes += answer.num_bytes
        self._use(id)
        self._answers.move_to_end(id)  # even if it follows too many

    def ended(self, id: str) -> None:
        """From now on, an answer that was being made is one like others. Room is made by others,
        so that it can be fetched. It may be gone."""
        found = self._answers.get(id)
        if found is not None:
            self._put(id, found)
            self._make_room(id)

    def get(self, owner: str, id: str) -> Kept | None:
        """The answer; None if it is not kept, or belongs to another caller."""
        found = self._answers.get(id)
        if found is None or found.owner != owner:
            return None
        self._use(id)
        return found

    def line(self, owner: str, id: str) -> list[Kept]:
        """The answer and all that it follows, the oldest first.

        Raises:
            KeyError: the id of one of them that is not kept.
        """
        found: list[Kept] = []
        at: str | None = id
        while at is not None:
            answer = self._answers.get(at)
            if answer is None or answer.owner != owner:
                raise KeyError(at)
            found.append(answer)
            at = answer.before
        self._use(id)
        return found[::-1]

    def remove(self, owner: str, id: str) -> bool:
        """Forget an answer. Whether it was there."""
        if self.get(owner, id) is None:
            return False
        self._drop(id)
        return True

    def _make_room(self, stays: str | None = None) -> None:
        while len(self._answers) > self._max_answers or self._num_bytes > self._max_bytes:
            may_go = (id for id in self._answers if id != stays and not self._is_made(id))
            oldest = next(may_go, None)
            if oldest is None:
                return
            self._drop(oldest)

    def _use(self, id: str | None) -> None:
        while id is not None and id in self._answers:
            self._answers.move_to_end(id)
            id = self._answers[id].before

    def _drop(self, id: str) -> None:
        found = self._answers.pop(id, None)
        if found is not None:
            self._num_bytes -= found.num_bytes
