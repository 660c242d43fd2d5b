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
from kernels.sampling.pipeline_reference import DrawSettings


def best_children(
    logits: Tensor, count: int, settings: DrawSettings, target_ids: Tensor | None, ops: Ops
) -> tuple[Tensor, Tensor]:
    """The `count` best tokens after each node, the best first; fewer if there are no more.

    Args:
        logits: [R, Vd] of the draft head.
        settings: how the target will draw the token after each node, [R].
        target_ids: [Vd] the target's id of each draft token; None if they are equal.

    Returns:
        [R, count] target token ids, and [R, count] float32 scores: the log-probability that each is
        drawn, given the noise.
    """
    ranked = ops.add_noise(logits, settings, target_ids)
    anyone = torch.zeros_like(settings.seeds)  # `score` wants a token; its probability is not used
    best = ops.score(ranked, anyone, min(count, logits.shape[1]))
    ids = best.top_ids if target_ids is None else target_ids[best.top_ids]
    return ids, best.top
