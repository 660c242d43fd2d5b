"""Where and with what a rank loads and runs its part of a model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from configs.schema import ExpertCut, WeightForm
from engine.models.weights import WeightPacker
from engine.parallel.shard import WHOLE, Shard
from engine.step.group import TPGroup
from kernels.ops import Ops


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's operations, dtype, device, shard and group. Loading needs no other rank."""

    ops: Ops
    dtype: torch.dtype  # of weights that are not quantised
    device: torch.device
    shard: Shard = WHOLE  # this rank's part of a model
    group: TPGroup = field(default_factory=TPGroup)  # the ranks that compute steps together
    weights: WeightForm = "stored"
    mlp_weights: WeightForm | None = None  # of gated feed-forwards; None: as the others
    cache: torch.dtype | None = None  # of keys and values; None: dtype
    experts: ExpertCut = "tensor"  # what ranks share of experts: their widths, or their number

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.cache or self.dtype

    def of_head(self, shard: Shard) -> Place:
        """For the pages of a draft head with this shard."""
        return replace(self, shard=shard, cache=None)

    def await_weights(self) -> None:
        """Wait until loaded weights lie in the device's memory: kernels may read some before they
        wait for earlier work of the device (kernels/triton_overlap.py)."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    @property
    def packer(self) -> WeightPacker:
        return WeightPacker(self.ops, self.dtype, self.device, self.weights)
