"""Choose the tokens after a node: the likeliest, given the noise of the position.

The target will draw argmax(log p / T + noise), and the noise is known: it is a function of (seed,
position, token). So the best guess is argmax(log q / T + noise). This never changes the output, and
it raises acceptance at temperature 1 close to that of greedy decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sampling.reference import gumbel, noise_bits, noise_keys

NUM_CANDIDATES = 64  # per node: only these, the likeliest without noise, get their noise


@dataclass(frozen=True, slots=True)
class Noise:
    """What determines the draws of R nodes."""

    temperatures: Tensor  # [R] float32, 0 is greedy
    seeds: Tensor  # [R] int64
    positions: Tensor  # [R] int64, of the token after each node
    any_sampled: bool  # False: all are greedy


def best_children(
    logits: Tensor, count: int, noise: Noise, target_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The `count` best tokens after each node, the best first.

    Args:
        logits: [R, Vd] of the draft head.
        target_ids: [Vd] the target's id of each draft token; None if they are equal.

    Returns:
        [R, count] target token ids, and [R, count] float32 scores: the log-probability that each is
        drawn, given the noise.
    """
    width = min(max(NUM_CANDIDATES, count), logits.shape[1])
    if not noise.any_sampled:
        width = min(count, logits.shape[1])
    best = logits.topk(width, dim=1)
    ids = best.indices if target_ids is None else target_ids[best.indices]
    scores = best.values - logits.logsumexp(dim=1, keepdim=True)
    if noise.any_sampled:
        sampled = noise.temperatures > 0
        heat = torch.where(sampled, noise.temperatures, 1.0)[:, None]
        bits = noise_bits(noise_keys(noise.seeds, noise.positions), ids)
        noisy = (best.values / heat + gumbel(bits)).log_softmax(dim=1)
        scores = torch.where(sampled[:, None], noisy, scores)
    order = scores.topk(min(count, width), dim=1)
    return ids.gather(1, order.indices), order.values
