"""Where a rank loads its part of a model and computes with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine.parallel.shard import WHOLE, Shard
from engine.step.group import TPGroup
from kernels.ops import Ops


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank computes, with what, and with whom. Loading asks no other rank."""

    ops: Ops
    dtype: torch.dtype  # of weights and KV cache
    device: torch.device
    shard: Shard = WHOLE  # the part of a model that is here
    group: TPGroup = field(default_factory=TPGroup)  # with which steps are computed
