"""What the runner needs from a target model."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.step.batch import ForwardBatch, ForwardContext


class TargetModel(Protocol):
    """A decoder that runs packed batches. It holds weights only; caches are in the context."""

    def forward(self, batch: ForwardBatch, ctx: ForwardContext) -> Tensor:
        """Hidden states after the final norm, [T, H]. Writes the batch's KV to the cache."""
        ...

    def logits(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """[R, H] -> [R, V / ranks] float32: this rank's slice, see `SpreadLogits`."""
        ...
