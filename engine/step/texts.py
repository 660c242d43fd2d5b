"""Whole texts as one step, for code that runs a model outside of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from engine.copies import upload
from engine.step.batch import ForwardBatch
from kernels.ops import AttentionMeta

BLOCK_SIZE = 16


def blocks_of(texts: Sequence[Sequence[int]]) -> int:
    """How many blocks of BLOCK_SIZE slots `batch_of` uses for these texts."""
    return sum(_num_blocks(len(text)) for text in texts)


def batch_of(texts: Sequence[Sequence[int]], device: torch.device) -> ForwardBatch:
    """All texts as prefill chunks from position 0; none must be empty. The host does not wait for
    the device."""
    counts = torch.tensor([len(text) for text in texts])
    tables = _tables(counts.tolist())
    ends = counts.cumsum(0)
    row_of = torch.arange(len(texts)).repeat_interleave(counts)
    positions = torch.arange(len(row_of)) - (ends - counts)[row_of]
    block, offset = positions // BLOCK_SIZE, positions % BLOCK_SIZE
    zeros = torch.zeros(len(texts), dtype=torch.int32)
    ids = np.fromiter(chain.from_iterable(texts), np.int64, len(row_of))
    longest = int(counts.max())
    batch = ForwardBatch(
        token_ids=torch.from_numpy(ids),
        positions=positions,
        slots=tables[row_of, block].long() * BLOCK_SIZE + offset,
        attention=AttentionMeta(
            cu_q=torch.cat((zeros[:1], ends.int())),
            prefix_lens=zeros,
            first_keys=zeros,
            block_tables=tables,
            ancestors=torch.zeros(len(row_of), dtype=torch.int64),
            max_q=longest,
            max_context=longest,
        ),
    )
    return upload(batch, device)


def _num_blocks(length: int) -> int:
    return -(-length // BLOCK_SIZE)


def _tables(lengths: list[int]) -> Tensor:
    """[B, max_blocks] int32: each text has its own blocks, in order."""
    tables = torch.zeros(len(lengths), _num_blocks(max(lengths)), dtype=torch.int32)
    first = 0
    for row, length in enumerate(lengths):
        count = _num_blocks(length)
        tables[row, :count] = torch.arange(first, first + count, dtype=torch.int32)
        first += count
    return tables
