"""Batches of examples. They depend only on the seed, so that a run can resume."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from drafter.train.encoding import Example
from drafter.train.target import TargetFeatures
from drafter.train.unroll import TrainBatch

POOL = 2048  # examples sorted by length together, so that batches need little padding


def batch_stream(lengths: Sequence[int], max_tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of example numbers. Each has at most `max_tokens` with padding, or is one
    example; every example comes once per epoch."""
    for epoch in itertools.count():
        yield from epoch_batches(lengths, max_tokens, seed, epoch)


def epoch_batches(
    lengths: Sequence[int], max_tokens: int, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of one epoch, in order."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    for first in range(0, len(order), POOL):
        pool = sorted(order[first : first + POOL], key=lambda number: lengths[number])
        batches += cut(pool, lengths, max_tokens)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def cut(numbers: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut examples, in order of length, into batches of at most `max_tokens` with padding."""
    batches: list[list[int]] = []
    for number in numbers:
        if not batches or lengths[number] * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


def collate(
    examples: Sequence[Example], features: TargetFeatures, device: torch.device
) -> TrainBatch:
    """Pad examples and the target's features of them; zeros follow each example."""
    lengths = [len(example.token_ids) for example in examples]
    ids = np.zeros((len(examples), max(lengths)), dtype=np.int64)
    is_answer = np.zeros(ids.shape, dtype=np.bool_)
    places = np.full(ids.shape, sum(lengths))  # past the last token: a row of zeros
    first = 0
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        ids[row, :length] = example.token_ids
        is_answer[row, :length] = example.is_answer
        places[row, :length] = np.arange(first, first + length)
        first += length
    index = torch.from_numpy(places).to(features.taps.device)
    return TrainBatch(
        token_ids=torch.from_numpy(ids).to(device),
        is_answer=torch.from_numpy(is_answer).to(device),
        taps=_padded(features.taps, index).to(device),
        hidden=_padded(features.hidden, index).to(device),
        best=_padded(features.best, index).to(device).long(),
    )


def _padded(values: Tensor, index: Tensor) -> Tensor:
    """[B, S, ...]: the rows `index` [B, S] of `values` [T, ...] followed by a row of zeros."""
    return torch.cat((values, torch.zeros_like(values[:1])))[index]


def least_learnt(lengths: Sequence[int], max_tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of at most `max_tokens`, while `lengths` may grow: always of the examples
    that have been in the fewest batches so far, so new ones come first."""
    generator = np.random.default_rng(seed)
    counts = np.zeros(0, dtype=np.int64)
    while True:
        counts = np.concatenate((counts, np.zeros(len(lengths) - len(counts), dtype=np.int64)))
        order = np.lexsort((generator.random(len(counts)), counts))
        chosen = order[:POOL]
        counts[chosen] += 1
        batches = cut(sorted(chosen.tolist(), key=lengths.__getitem__), lengths, max_tokens)
        for index in generator.permutation(len(batches)):
            yield batches[index]
