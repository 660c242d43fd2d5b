"""Grouped-query attention over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.runner.forward import ForwardContext
from kernels.ops import AttentionMeta


class AttentionInputs(Protocol):
    """What attention reads of a batch: the target's `ForwardBatch`, or a drafter's own."""

    @property
    def positions(self) -> Tensor: ...  # [T] int64

    @property
    def slots(self) -> Tensor: ...  # [T] int64, where each entry's KV goes

    @property
    def attention(self) -> AttentionMeta: ...


@dataclass(frozen=True, slots=True)
class Attention:
    """Queries, keys and values in one product; rotation and cache write in one operation."""

    layer: int
    qkv: ColumnParallelLinear  # H -> (Hq + 2 Hkv) D
    output: RowParallelLinear  # Hq D -> H
    cos_sin: Tensor  # [max_len, D] float32
    scale: float

    def __call__(self, x: Tensor, batch: AttentionInputs, ctx: ForwardContext) -> Tensor:
        keys, values = ctx.kv.keys[self.layer], ctx.kv.values[self.layer]
        queries = ctx.ops.rope_kv_write(
            self.qkv(x, ctx), self.cos_sin, batch.positions, batch.slots, keys, values
        )  # [T, Hq, D]
        mixed = ctx.ops.attention(queries, keys, values, batch.attention, self.scale)
        return self.output(mixed, ctx)
