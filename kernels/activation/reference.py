"""Gated activations in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202): [T, 2F] with the gate first -> [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.float()).mul(up).to(gate_up.dtype)
