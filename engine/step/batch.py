"""Device tensors of one step. They are passed to the model as arguments, never kept in a global."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.kv.storage import KVStorage
from engine.step.group import TPGroup
from kernels.ops import AttentionMeta, Ops

LOGIT_ROWS = 512  # rows of logits at a time: bounds them to [512, V]


def logit_slices(num_rows: int) -> Iterator[slice]:
    """All of `num_rows` rows, LOGIT_ROWS at a time; one empty slice of none."""
    for first in range(0, max(num_rows, 1), LOGIT_ROWS):
        yield slice(first, min(first + LOGIT_ROWS, num_rows))


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """All rows of a step, packed along T: roots, tree nodes and prefill chunks alike. Tokens that
    belong to no row of `attention.cu_q` are padding: their KV goes to scratch, and their results
    are meaningless."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64, where each token's KV goes
    attention: AttentionMeta
    only_roots: bool = False  # every row is a draft tree or a single token, not a prompt chunk
    # For layers that see only their own chunk of positions; set by models that have such layers
    chunked: AttentionMeta | None = None


class FeatureTap(Protocol):
    """Receives hidden states while the target runs. Without a tap the model skips the call."""

    layers: frozenset[int]  # record the input of these layers; num_layers means the final norm

    def record(self, layer: int, hidden: Tensor) -> None:
        """Take `hidden` [T, H], the residual stream that enters `layer`. Must copy to keep it."""
        ...


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Everything a forward needs besides its batch; the same object for every step."""

    ops: Ops
    kv: KVStorage
    group: TPGroup
    tap: FeatureTap | None = None
