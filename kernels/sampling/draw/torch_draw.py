"""The operation `draw` for CPUs: the tokens of `reference.draw`, but faster.

Only sampled rows are scaled and filtered, and no row is sorted whole. Shapes depend on values, so
another device would have to be waited for; it has its own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.sampling.draw.reference import are_allowed, masked
from kernels.sampling.reference import noise_keys
from kernels.sampling.settings import DrawSettings

FIRST_WIDTH = 256  # candidates in the first search for the top-p mass


@dataclass(frozen=True, slots=True)
class TorchDraw:
    """The operation `draw`, built on a backend's arg-max and draw from logits."""

    argmax: Callable[[Tensor], Tensor]
    gumbel_argmax: Callable[[Tensor, Tensor], Tensor]
    unfiltered: Callable[[Tensor, DrawSettings], Tensor] | None = None  # the whole in one

    def __call__(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        """logits [R, V] float32, which stay unchanged -> [R] int64."""
        if settings.allowed is not None and not settings.is_filtered:
            return self._checked(logits, settings, settings.allowed)
        logits = masked(logits, settings.allowed)
        if not settings.any_sampled:
            return self.argmax(logits)
        if self.unfiltered is not None and not settings.is_filtered:
            return self.unfiltered(logits, replace(settings, allowed=None))
        if not settings.any_greedy:
            return self._sampled(logits, settings, slice(None))
        drawn = self.argmax(logits)
        rows = (settings.temperature > 0).nonzero()[:, 0]
        if len(rows):
            drawn[rows] = self._sampled(logits[rows], settings, rows)
        return drawn

    def _checked(self, logits: Tensor, settings: DrawSettings, allowed: Tensor) -> Tensor:
        """Draw among all tokens; the best one is also the best of those that are allowed, if it is
        one of them. Only rows where it is not are drawn again."""
        free = replace(settings, allowed=None)
        drawn = self(logits, free)
        rows = (~are_allowed(drawn, allowed)).nonzero()[:, 0]
        if len(rows):
            some = replace(
                free,
                temperature=settings.temperature[rows],
                seeds=settings.seeds[rows],
                positions=settings.positions[rows],
            )
            drawn[rows] = self(masked(logits[rows], allowed[rows]), some)
        return drawn

    def _sampled(self, logits: Tensor, settings: DrawSettings, rows: Tensor | slice) -> Tensor:
        scaled = logits / settings.temperature[rows, None]
        if settings.is_filtered:
            top_k, top_p, min_p = settings.filters(logits.shape[1])
            scaled = filter_logits(scaled, top_k[rows], top_p[rows], min_p[rows])
        keys = noise_keys(settings.seeds[rows], settings.positions[rows])
        return self.gumbel_argmax(scaled, keys)


def filter_logits(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set everything outside top-k, top-p and min-p to -inf.

    Args:
        scaled: [R, V] logits after temperature.
        top_k, top_p, min_p: [R]; V, 1 and 0 where off.
    """
    vocab_size = scaled.shape[1]
    width = _first_width(top_k, top_p, vocab_size)
    while True:
        best = scaled.topk(width, dim=1).values  # [R, width] descending
        threshold, complete = _threshold(scaled, best, top_k, top_p)
        if complete or width == vocab_size:
            break
        width = min(vocab_size, width * 8)
    threshold = torch.maximum(threshold, best[:, 0] + min_p.log())
    return scaled.masked_fill(scaled < threshold[:, None], -torch.inf)


def _first_width(top_k: Tensor, top_p: Tensor, vocab_size: int) -> int:
    """Wide enough for every active top-k; a first guess for top-p without top-k."""
    largest_k = int(torch.where(top_k < vocab_size, top_k, 1).max())
    guess = FIRST_WIDTH if bool(((top_p < 1) & (top_k >= vocab_size)).any()) else 1
    return min(vocab_size, max(largest_k, guess))


def _threshold(scaled: Tensor, best: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, bool]:
    """The smallest logit that top-k and top-p keep, [R]; and False if `best` is too narrow."""
    vocab_size, width = scaled.shape[1], best.shape[1]
    lowest = torch.full_like(best[:, 0], -torch.inf)
    has_k, has_p = top_k < vocab_size, top_p < 1
    last = (top_k.clamp(max=width) - 1)[:, None]
    threshold = torch.where(has_k, best.gather(1, last)[:, 0], lowest)
    if not bool(has_p.any()):
        return threshold, True
    mass = (best - best[:, :1]).exp().cumsum(dim=1)  # [R, width] unnormalised
    everything = (scaled - best[:, :1]).exp().sum(dim=1)
    total = torch.where(has_k, mass.gather(1, last)[:, 0], everything)
    # Keep a token while the mass before it is below top_p: the first one is always kept.
    reached = mass >= (top_p * total)[:, None]
    complete = bool((reached.any(dim=1) | ~has_p | has_k).all())
    first = torch.where(reached.any(dim=1), reached.int().argmax(dim=1), width - 1)
    top_p_threshold = torch.where(has_p, best.gather(1, first[:, None])[:, 0], lowest)
    return torch.maximum(threshold, top_p_threshold), complete
