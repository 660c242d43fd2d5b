"""The frozen target in the training loop: the engine's model, without cache and scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from drafter.taps import FeatureCollector
from engine.copies import upload
from engine.kv.storage import KVStorage
from engine.models.interface import LoadedModel
from engine.step.batch import ForwardBatch, ForwardContext
from engine.step.group import TPGroup
from kernels.ops import AttentionMeta, Ops

BLOCK_SIZE = 16
# Rows of logits at a time; on a CPU so few that the allocator keeps and reuses their memory.
LOGIT_ROWS = {"cpu": 128, "cuda": 4096}


@dataclass(frozen=True, slots=True)
class TargetFeatures:
    """The target's features of texts of T tokens in all, one after the other."""

    taps: Tensor  # [T, feature_size] storage dtype: the tapped layers, concatenated
    hidden: Tensor  # [T, H] storage dtype, after the final norm
    best: Tensor  # [T] int32, the likeliest next token

    def split(self, lengths: Sequence[int]) -> list[TargetFeatures]:
        """Of each text, `lengths` being their numbers of tokens."""
        parts = (torch.split(x, list(lengths)) for x in (self.taps, self.hidden, self.best))
        return [TargetFeatures(*own) for own in zip(*parts, strict=True)]

    @classmethod
    def join(cls, parts: Sequence[TargetFeatures]) -> TargetFeatures:
        """The inverse of `split`."""
        return cls(
            torch.cat([part.taps for part in parts]),
            torch.cat([part.hidden for part in parts]),
            torch.cat([part.best for part in parts]),
        )


class FrozenTarget:
    """Runs whole texts through the target, several at once."""

    def __init__(
        self, model: LoadedModel, ops: Ops, tap_layers: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """`dtype`: type of the pages and the features."""
        self._model = model
        self._ops = ops
        self._order = tap_layers
        self._dtype = dtype
        self._device = model.embedding.weight.data.device
        self._storage: KVStorage | None = None

    @torch.no_grad()
    def features(self, texts: Sequence[Sequence[int]]) -> TargetFeatures:
        """Of all texts, in order. Texts must not be empty."""
        lengths = [len(text) for text in texts]
        batch = self._batch(texts, lengths)
        tap = FeatureCollector(self._order)
        ctx = ForwardContext(self._ops, self._pages(lengths), TPGroup(), tap)
        hidden = self._model.forward(batch, ctx)
        best = self._best(hidden, ctx)
        taps = torch.cat(tap.take_all(), dim=-1).to(self._dtype)
        return TargetFeatures(taps, hidden.to(self._dtype), best)

    @torch.no_grad()
    def logits(self, text: Sequence[int]) -> Tensor:
        """[S, V], the logits after each token of one text of S tokens."""
        lengths = [len(text)]
        ctx = ForwardContext(self._ops, self._pages(lengths), TPGroup())
        return self._model.logits(self._model.forward(self._batch([text], lengths), ctx), ctx)

    def _best(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """[T] int32, the likeliest next token. The logits of all T never exist at once."""
        size = LOGIT_ROWS[hidden.device.type]
        found = [
            self._ops.argmax(self._model.logits(hidden[first : first + size], ctx))
            for first in range(0, len(hidden), size)
        ]
        return torch.cat(found).to(torch.int32)

    def _batch(self, texts: Sequence[Sequence[int]], lengths: list[int]) -> ForwardBatch:
        """All texts as prefill chunks from position 0. The host does not wait for the device."""
        tables = _tables(lengths)
        counts = torch.tensor(lengths)
        ends = counts.cumsum(0)
        row_of = torch.arange(len(lengths)).repeat_interleave(counts)
        positions = torch.arange(len(row_of)) - (ends - counts)[row_of]
        block, offset = positions // BLOCK_SIZE, positions % BLOCK_SIZE
        zeros = torch.zeros(len(lengths), dtype=torch.int32)
        ids = np.fromiter(chain.from_iterable(texts), np.int64, len(row_of))
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
                max_q=max(lengths),
                max_context=max(lengths),
            ),
        )
        return upload(batch, self._device)

    def _pages(self, lengths: list[int]) -> KVStorage:
        """Pages for texts of these lengths, reused for the next batch."""
        needed = sum(_num_blocks(length) for length in lengths)
        arch = self._model.arch
        if self._storage is None or len(self._storage.keys[0]) < needed:
            self._storage = KVStorage.allocate(
                arch.num_layers,
                needed,
                BLOCK_SIZE,
                arch.num_kv_heads,
                arch.head_dim,
                self._dtype,
                self._device,
            )
        return self._storage


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
