"""A mixture of experts in plain torch, one expert at a time."""

from __future__ import annotations

from torch import Tensor

from kernels.activation.reference import silu_and_mul
from kernels.ops import ExpertWeights


def route(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs [T, H], scaled by the sigmoid of each token's largest logit, and the expert [T]
    int64 that it belongs to; the first one among equals."""
    best, experts = logits.max(dim=-1)
    return x * best.float().sigmoid().to(x.dtype)[:, None], experts


def moe(x: Tensor, logits: Tensor, weights: ExpertWeights) -> Tensor:
    """down(silu(gate(s x)) * up(s x)) of one expert per token, s the router's score: Llama 4 scales
    the inputs of an expert, not its outputs.

    Args:
        x: [T, H].
        logits: [T, E] of the router.
        weights: `ops.stacks_experts` is true here.

    Returns:
        [T, H]; zeros for tokens whose expert is not held.
    """
    scaled, experts = route(x, logits)
    (gate_up,), (down,) = weights.gate_up, weights.down
    held = weights.held or range(logits.shape[1])
    out = x.new_zeros(len(x), down.out_features)
    for expert in set(experts.tolist()).intersection(held):
        rows, place = experts == expert, held.index(expert)
        inner = silu_and_mul(scaled[rows] @ gate_up.data[place].to(x.dtype))
        out[rows] = inner @ down.data[place].to(x.dtype)
    return out
