"""Scores to rank drafts by, in plain torch: log q / T and the noise that the target will draw with.

The target draws argmax(log p / T + noise) among the tokens that its filters keep, and the noise is
known: it is a function of (seed, position, token id). So the best guess of a draft head, whose
distribution is q, is argmax(log q / T + noise) among the tokens that the same filters keep of q.
A guess never changes the text. So the filters are rough here: they sort tokens into bins by the
distance to the highest logit, and keep whole bins.

No function here waits for the device: no shape depends on values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.sampling.reference import gumbel, noise_bits, noise_keys
from kernels.sampling.settings import DrawSettings

BINS = 1024
BINS_PER_NAT = 32  # so a bin's masses differ by 3 %; everything beyond 32 nats is in the last bin
OUTSIDE = 30.0  # taken off a token that the filters reject: a child only if too few others are left


def add_noise(logits: Tensor, settings: DrawSettings, token_ids: Tensor | None) -> Tensor:
    """The logits [R, V] float32 of a draft head as a sampled row ranks them, [R, V] float32: after
    temperature, filters and noise. Greedy rows keep theirs. Without `any_sampled` the result may be
    `logits` itself.

    Args:
        settings: of R rows; `allowed` must be None.
        token_ids: [V] int64 the target's id of each token, which its noise belongs to; None if they
            are equal.
    """
    if not settings.any_sampled:
        return logits
    sampled = (settings.temperature > 0)[:, None]
    scaled = logits / torch.where(sampled, settings.temperature[:, None], 1.0)
    if settings.is_filtered:
        scaled = torch.where(kept(scaled, settings), scaled, scaled - OUTSIDE)
    if token_ids is None:
        token_ids = torch.arange(logits.shape[1], device=logits.device)
    keys = noise_keys(settings.seeds, settings.positions)
    return torch.where(sampled, scaled + gumbel(noise_bits(keys, token_ids)), logits)


def kept(scaled: Tensor, settings: DrawSettings) -> Tensor:
    """[R, V] bool: the tokens that top-k, top-p and min-p keep, by whole bins.

    Args:
        scaled: [R, V] logits after temperature.
    """
    R, V = scaled.shape
    top_k, top_p, min_p = settings.filters(V)
    gaps = scaled.amax(dim=1, keepdim=True) - scaled  # NaN or inf where there is no number
    bins = torch.where(gaps.isfinite(), gaps * BINS_PER_NAT, BINS).clamp(max=BINS - 1).long()
    counts = torch.zeros(R, BINS, device=scaled.device).scatter_add_(
        1, bins, torch.ones_like(scaled)
    )
    return bins < num_kept_bins(counts, top_k, top_p, min_p)[:, None]


def num_kept_bins(counts: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """How many of the best bins are kept, [R] int64: at least 1.

    Args:
        counts: [R, BINS] float32 tokens.
        top_k, top_p, min_p: [R].
    """
    places = torch.arange(BINS, device=counts.device)
    before = counts.cumsum(dim=1) - counts
    ranked = torch.minimum(
        counts, (top_k[:, None] - before).clamp(min=0).float()
    )  # among the best top_k
    masses = ranked * (-(places + 0.5) / BINS_PER_NAT).exp()
    upto = masses.cumsum(dim=1)
    keeps = before < top_k[:, None]
    keeps &= (upto - masses < top_p[:, None] * upto[:, -1:]) | (top_p >= 1)[:, None]
    keeps &= places < BINS_PER_NAT * -min_p[:, None].log() + 1
    return keeps.sum(dim=1).clamp(min=1)
