"""What the runner needs from a target model."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.checkpoints.arch import LlamaArch
from engine.models.layers import LMHead, VocabParallelEmbedding
from engine.step.batch import ForwardBatch, ForwardContext


class TargetModel(Protocol):
    """A decoder that runs packed batches. It holds weights only; caches are in the context."""

    @property
    def attention_chunk(self) -> int | None:
        """If some layers see only their own chunk of so many positions: a draft tree must not reach
        into the next one."""
        ...

    def forward(self, batch: ForwardBatch, ctx: ForwardContext) -> Tensor:
        """Hidden states after the final norm, [T, H]. Writes the batch's KV to the cache."""
        ...

    def logits(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """[R, H] -> [R, V / ranks] float32: this rank's slice, see `SpreadLogits`."""
        ...


class LoadedModel(TargetModel, Protocol):
    """A target, with what a draft head may share."""

    @property
    def arch(self) -> LlamaArch: ...

    @property
    def embedding(self) -> VocabParallelEmbedding: ...

    @property
    def head(self) -> LMHead: ...
