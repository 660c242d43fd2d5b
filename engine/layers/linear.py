"""Linear layers and their collectives. Weights are packed once, when the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.runner.forward import ForwardContext
from kernels.ops import LinearWeight


@dataclass(frozen=True, slots=True)
class ColumnParallelLinear:
    """Each rank holds a slice of the outputs; the input is whole on every rank."""

    weight: LinearWeight

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return ctx.ops.linear(x, self.weight)  # [T, N / ranks]


@dataclass(frozen=True, slots=True)
class GatheredLinear:
    """Each rank computes equally many outputs (see `Shard.padded`), which are then put together:
    input and output are whole on every rank."""

    weight: LinearWeight
    num_outputs: int  # N; ranks together compute a few more if it does not divide

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        outputs = ctx.group.all_gather(ctx.ops.linear(x, self.weight))
        return outputs[..., : self.num_outputs].contiguous()  # [T, N]


@dataclass(frozen=True, slots=True)
class RowParallelLinear:
    """Each rank holds a slice of the inputs; partial outputs are summed over ranks."""

    weight: LinearWeight

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return ctx.group.all_reduce(ctx.ops.linear(x, self.weight))  # [T, N]
