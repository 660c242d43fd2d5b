"""The contract by which a draft head reads hidden states of the target."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class FeatureTap(Protocol):
    """Receives hidden states while the target runs. No tap, no cost: the model skips the call."""

    layers: frozenset[int]  # record the input of these layers; num_layers means the final norm

    def record(self, layer: int, hidden: Tensor) -> None:
        """Take `hidden` [T, H], the residual stream that enters `layer`. Must copy to keep it."""
        ...
