"""Batches of examples. They depend only on the seed, so that a run can resume."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drafter.train.data.encoding import Example
from drafter.train.data.target import TargetFeatures
from drafter.train.head.unroll import TrainBatch
from engine.copies import upload

Integers = npt.NDArray[np.int64]
POOL = 2048  # examples sorted by length together, so that batches need little padding


def batch_stream(
    lengths: Sequence[int], max_tokens: int, seed: int, packed: bool = False
) -> Iterator[list[int]]:
    """Endless batches of example numbers, as `cut` cuts them; every example comes once per
    epoch."""
    for epoch in itertools.count():
        yield from epoch_batches(lengths, max_tokens, seed, epoch, packed)


def epoch_batches(
    lengths: Sequence[int], max_tokens: int, seed: int, epoch: int, packed: bool = False
) -> list[list[int]]:
    """The batches of one epoch, in order."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    for first in range(0, len(order), POOL):
        batches += cut(order[first : first + POOL], lengths, max_tokens, packed)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def cut(
    numbers: Sequence[int], lengths: Sequence[int], max_tokens: int, packed: bool = False
) -> list[list[int]]:
    """Cut examples into batches of at most `max_tokens`, or of one example. Padding counts, so
    examples of similar length come together; `packed` batches have none, and keep the order."""
    batches: list[list[int]] = []
    used = 0
    for number in numbers if packed else sorted(numbers, key=lengths.__getitem__):
        length = lengths[number]
        needed = used + length if packed or not batches else length * (len(batches[-1]) + 1)
        if not batches or needed > max_tokens:
            batches.append([])
            needed = length
        batches[-1].append(number)
        used = needed
    return batches


def collate(
    examples: Sequence[Example],
    features: TargetFeatures,
    device: torch.device,
    packed: bool = False,
) -> TrainBatch:
    """Examples and the target's features of them: side by side, each followed by zeros, or
    `packed`, in one row one after the other."""
    lengths = np.array([len(example.token_ids) for example in examples])
    ends = lengths.cumsum()
    total = int(ends[-1])
    ids = np.fromiter(itertools.chain.from_iterable(e.token_ids for e in examples), np.int64, total)
    answers = itertools.chain.from_iterable(e.is_answer for e in examples)
    is_answer = np.fromiter(answers, np.bool_, total)
    if packed:
        starts = (ends - lengths).repeat(lengths)[None]
        there = (ids[None], is_answer[None])
        parts = [part.to(device)[None] for part in (features.taps, features.hidden, features.best)]
    else:
        places = _side_by_side(lengths, ends)
        starts = np.zeros(places.shape, dtype=np.int64)
        there = (np.append(ids, 0)[places], np.append(is_answer, False)[places])
        index = torch.from_numpy(places).to(features.taps.device)
        parts = [
            _padded(part, index).to(device)
            for part in (features.taps, features.hidden, features.best)
        ]
    taps, hidden, best = parts
    return TrainBatch(
        token_ids=upload(torch.from_numpy(there[0]), device),
        is_answer=torch.from_numpy(there[1]),
        starts=torch.from_numpy(starts),
        taps=taps,
        hidden=hidden,
        best=best.long(),
    )


def _side_by_side(lengths: Integers, ends: Integers) -> Integers:
    """[B, S]: the place of each token among all, and past the last one, where a text has ended."""
    columns = np.arange(lengths.max())
    places = (ends - lengths)[:, None] + columns
    return np.where(columns < lengths[:, None], places, ends[-1])


def _padded(values: Tensor, index: Tensor) -> Tensor:
    """[B, S, ...]: the rows `index` [B, S] of `values` [T, ...] followed by a row of zeros."""
    return torch.cat((values, torch.zeros_like(values[:1])))[index]


def least_learnt(
    lengths: Sequence[int], max_tokens: int, seed: int, packed: bool = False
) -> Iterator[list[int]]:
    """Endless batches, as `cut` cuts them, while `lengths` may grow: always of the examples that
    have been in the fewest batches so far, so new ones come first."""
    generator = np.random.default_rng(seed)
    counts = np.zeros(0, dtype=np.int64)
    while True:
        counts = np.concatenate((counts, np.zeros(len(lengths) - len(counts), dtype=np.int64)))
        order = np.lexsort((generator.random(len(counts)), counts))
        chosen = order[:POOL]
        counts[chosen] += 1
        batches = cut(chosen.tolist(), lengths, max_tokens, packed)
        for index in generator.permutation(len(batches)):
            yield batches[index]
