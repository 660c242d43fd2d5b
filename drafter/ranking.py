"""Choose the tokens after a node: the likeliest, given the noise of the position.

The target will draw argmax(log p / T + noise) among the tokens that its filters keep, and the noise
is known. So the best guess is argmax(log q / T + noise), over the whole draft vocabulary. This
never changes the output, and it raises acceptance at temperature 1 close to that of greedy
decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import Ops


def best_children(
    ranked: Tensor, count: int, target_ids: Tensor | None, ops: Ops
) -> tuple[Tensor, Tensor]:
    """The `count` best tokens after each node, the best first; fewer if there are no more.

    Args:
        ranked: [R, Vd] logits of the draft head with the noise of `ops.add_noise`.
        target_ids: [Vd] the target's id of each draft token; None if they are equal.

    Returns:
        [R, count] target token ids, and [R, count] float32 scores: the log-probability that each is
        drawn, given the noise.
    """
    # `score` wants a token; its probability is not used
    anyone = torch.zeros(len(ranked), dtype=torch.int64, device=ranked.device)
    best = ops.score(ranked, anyone, min(count, ranked.shape[1]))
    return _target_ids(best.top_ids, target_ids), best.top


def best_child(ranked: Tensor, target_ids: Tensor | None, ops: Ops) -> Tensor:
    """The first of `best_children`, [R]."""
    return _target_ids(ops.argmax(ranked), target_ids)


def _target_ids(ids: Tensor, target_ids: Tensor | None) -> Tensor:
    return ids if target_ids is None else target_ids[ids]
