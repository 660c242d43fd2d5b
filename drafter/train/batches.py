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
    examples: Sequence[Example], features: Sequence[TargetFeatures], device: torch.device
) -> TrainBatch:
    """Pad examples and the target's features of them."""
    longest = max(len(example.token_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    is_answer = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        here = slice(len(example.token_ids))
        ids[row, here] = torch.as_tensor(example.token_ids)
        is_answer[row, here] = torch.as_tensor(example.is_answer, dtype=torch.bool)
    return TrainBatch(
        token_ids=ids.to(device),
        is_answer=is_answer.to(device),
        taps=_padded([f.taps for f in features], longest).to(device),
        hidden=_padded([f.hidden for f in features], longest).to(device),
        best=_padded([f.best for f in features], longest).to(device).long(),
    )


def _padded(parts: Sequence[Tensor], length: int) -> Tensor:
    """[B, length, ...], with zeros after each part."""
    result = parts[0].new_zeros(len(parts), length, *parts[0].shape[1:])
    for row, part in enumerate(parts):
        result[row, : len(part)] = part
    return result


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
