"""Batches depend only on the seed: every example once per epoch, within the limit of tokens."""

from __future__ import annotations

import itertools

import pytest
import torch

from drafter.train.data import batches as module
from drafter.train.data.batches import batch_stream, collate, cut, epoch_batches, least_learnt
from drafter.train.data.encoding import Example
from drafter.train.data.target import TargetFeatures

LENGTHS = torch.randint(2, 90, (300,), generator=torch.Generator().manual_seed(1)).tolist()
LIMIT = 256


@pytest.mark.parametrize("pool", [1, 64, 2048])
def test_every_example_comes_once_per_epoch(pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POOL", pool)
    for epoch in range(3):
        found = epoch_batches(LENGTHS, LIMIT, 5, epoch)
        assert sorted(itertools.chain.from_iterable(found)) == list(range(len(LENGTHS)))
        assert all(found)


@pytest.mark.parametrize("limit", [1, 100, LIMIT, 10**6])
def test_batches_keep_to_the_limit_with_padding_unless_of_one_example(limit: int) -> None:
    for batch in epoch_batches(LENGTHS, limit, 5, 0):
        longest = max(LENGTHS[number] for number in batch)
        assert len(batch) == 1 or longest * len(batch) <= limit


def test_batches_need_little_padding() -> None:
    found = epoch_batches(LENGTHS, LIMIT, 5, 0)
    padded = sum(max(LENGTHS[n] for n in batch) * len(batch) for batch in found)
    assert padded < 1.1 * sum(LENGTHS)


def test_seed_and_epoch_alone_decide_the_order() -> None:
    first = epoch_batches(LENGTHS, LIMIT, 5, 0)
    assert epoch_batches(LENGTHS, LIMIT, 5, 0) == first
    assert epoch_batches(LENGTHS, LIMIT, 6, 0) != first
    assert epoch_batches(LENGTHS, LIMIT, 5, 1) != first
    longest = [max(LENGTHS[n] for n in batch) for batch in first]
    assert longest != sorted(longest)  # short texts do not all come first


def test_the_stream_goes_on_with_the_next_epoch() -> None:
    epochs = [epoch_batches(LENGTHS, LIMIT, 5, epoch) for epoch in range(3)]
    expected = [batch for epoch in epochs for batch in epoch]
    assert list(itertools.islice(batch_stream(LENGTHS, LIMIT, 5), len(expected))) == expected


def test_cut_fills_batches_by_length_or_in_order() -> None:
    assert cut([1, 3, 2, 0], [2, 5, 4, 2], 8) == [[3, 0], [2], [1]]
    assert cut([1, 3, 2, 0], [2, 5, 4, 2], 8, packed=True) == [[1, 3], [2, 0]]
    assert cut([0, 1], [9, 1], 8, packed=True) == [[0], [1]]
    assert cut([0, 1], [4, 4], 8) == [[0, 1]]
    assert cut([0], [9], 8) == [[0]]
    assert cut([], [], 8) == []


def test_collate_pads_with_zeros_and_marks_nothing_there() -> None:
    examples = [Example([5, 6, 7], [False, True, True]), Example([8, 9], [False, True])]
    features = [
        TargetFeatures(
            torch.full((n, 4), float(n), dtype=torch.bfloat16),
            torch.full((n, 2), -float(n), dtype=torch.bfloat16),
            torch.full((n,), n, dtype=torch.int32),
        )
        for n in (3, 2)
    ]
    batch = collate(examples, TargetFeatures.join(features), torch.device("cpu"))
    assert batch.token_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.is_answer.tolist() == [[False, True, True], [False, True, False]]
    assert batch.starts.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert batch.taps[..., 0].tolist() == [[3, 3, 3], [2, 2, 0]]
    assert batch.hidden[..., 1].tolist() == [[-3, -3, -3], [-2, -2, 0]]
    assert batch.best.tolist() == [[3, 3, 3], [2, 2, 0]]
    assert (batch.taps.shape, batch.hidden.shape) == ((2, 3, 4), (2, 3, 2))
    assert (batch.taps.dtype, batch.best.dtype) == (torch.bfloat16, torch.int64)


def test_packed_examples_follow_each_other_in_one_row() -> None:
    examples = [Example([5, 6, 7], [False, True, True]), Example([8, 9], [False, True])]
    features = TargetFeatures(torch.ones(5, 4), torch.ones(5, 2), torch.arange(5).int())
    batch = collate(examples, features, torch.device("cpu"), packed=True)
    assert batch.token_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.is_answer.tolist() == [[False, True, True, False, True]]
    assert batch.starts.tolist() == [[0, 0, 0, 3, 3]]
    assert batch.best.tolist() == [[0, 1, 2, 3, 4]]
    assert batch.taps.shape == (1, 5, 4)


def test_of_a_growing_list_the_examples_learnt_least_come_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "POOL", 10)
    lengths = [5] * 40
    stream = least_learnt(lengths, 50, seed=3)
    first = [next(stream) for _ in range(6)]
    assert all(len(batch) == 10 for batch in first)
    assert sorted(itertools.chain.from_iterable(first[:4])) == list(range(40))
    lengths += [7] * 20
    later = [next(stream) for _ in range(7)]  # of at most 7 examples, since these are longer
    found = list(itertools.chain.from_iterable(later))
    assert set(range(40, 60)) <= set(found[:20])
    counts = torch.bincount(torch.tensor([*itertools.chain.from_iterable(first), *found]))
    assert int(counts.max()) <= 2
