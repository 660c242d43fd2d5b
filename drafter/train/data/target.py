"""The frozen target in the training loop: the engine's model, without cache and scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.taps import FeatureCollector
from engine.kv.storage import KVStorage
from engine.models.interface import LoadedModel
from engine.step.batch import ForwardContext
from engine.step.group import TPGroup
from engine.step.texts import BLOCK_SIZE, batch_of, blocks_of
from kernels.ops import Ops

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
        batch = batch_of(texts, self._device)
        tap = FeatureCollector(self._order)
        ctx = ForwardContext(self._ops, self._pages(texts), TPGroup(), tap)
        hidden = self._model.forward(batch, ctx)
        best = self._best(hidden, ctx)
        taps = torch.cat(tap.take_all(), dim=-1).to(self._dtype)
        return TargetFeatures(taps, hidden.to(self._dtype), best)

    @torch.no_grad()
    def logits(self, text: Sequence[int]) -> Tensor:
        """[S, V], the logits after each token of one text of S tokens."""
        ctx = ForwardContext(self._ops, self._pages([text]), TPGroup())
        hidden = self._model.forward(batch_of([text], self._device), ctx)
        return self._model.logits(hidden, ctx)

    def _best(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """[T] int32, the likeliest next token. The logits of all T never exist at once."""
        size = LOGIT_ROWS[hidden.device.type]
        found = [
            self._ops.argmax(self._model.logits(hidden[first : first + size], ctx))
            for first in range(0, len(hidden), size)
        ]
        return torch.cat(found).to(torch.int32)

    def _pages(self, texts: Sequence[Sequence[int]]) -> KVStorage:
        """Pages for these texts, reused for the next batch."""
        needed = blocks_of(texts)
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
