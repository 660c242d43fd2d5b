"""The draft vocabulary holds the tokens that answers use most."""

from __future__ import annotations

import pytest
import torch

from drafter.train.data.draft_vocabulary import choose, count_answers
from drafter.train.data.encoding import Example


def test_answer_tokens_are_counted_and_no_others() -> None:
    examples = [
        Example([4, 4, 1, 4, 2], [False, False, True, True, True]),
        Example([3, 1], [False, True]),
    ]
    assert count_answers(iter(examples), 6).tolist() == [0, 2, 1, 0, 1, 0]
    assert count_answers([], 3).tolist() == [0, 0, 0]


def test_the_most_frequent_are_chosen_in_ascending_order() -> None:
    found = choose(torch.tensor([1, 0, 7, 0, 5, 3]), 3)
    assert found.target_ids.tolist() == [2, 4, 5]
    assert found.coverage == pytest.approx(15 / 16)


@pytest.mark.parametrize(("size", "ids"), [(2, [0, 3]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 4])])
def test_ties_go_to_lower_ids_also_among_tokens_never_seen(size: int, ids: list[int]) -> None:
    assert choose(torch.tensor([2, 0, 0, 2, 0]), size).target_ids.tolist() == ids


@pytest.mark.parametrize("size", [0, 4])
def test_sizes_outside_the_vocabulary_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"draft_vocab_size {size} must be 1 to 3"):
        choose(torch.ones(3, dtype=torch.int64), size)


def test_no_answer_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no example has an answer token"):
        choose(torch.zeros(3, dtype=torch.int64), 2)
