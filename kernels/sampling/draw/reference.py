"""The operation `draw` in plain torch: from edited logits to one token per row.

The order is: grammar mask, temperature, then top-k, top-p (over the tokens that top-k kept) and
min-p, then the arg-max after adding the noise of (seed, position). Every filter is a threshold on
the scaled logits of its row. Tokens that tie with the last one kept are kept too, so a token t is
drawn only if

    fewer than top_k tokens lie strictly above t, and
    the mass strictly above t is below top_p of the mass of the best top_k tokens, and
    t >= highest + log(min_p).

Nothing here waits for the device: no shape depends on values.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.sampling.reference import gumbel_argmax, noise_keys
from kernels.sampling.settings import DrawSettings


def draw(logits: Tensor, settings: DrawSettings) -> Tensor:
    """One token per row of edited logits [R, V] float32, [R] int64: the best token of a greedy row,
    a random draw for other rows. The logits stay unchanged."""
    logits = masked(logits, settings.allowed)
    sampled = settings.temperature > 0
    scaled = logits / torch.where(sampled, settings.temperature, 1.0)[:, None]
    keys = noise_keys(settings.seeds, settings.positions)
    drawn = gumbel_argmax(keep(scaled, settings), keys)
    return torch.where(sampled, drawn, logits.argmax(dim=1))


def masked(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """The logits, with -inf for tokens that a grammar mask forbids; unchanged without a mask."""
    if allowed is None:
        return logits
    return logits.masked_fill(_bits(~allowed)[:, : logits.shape[1]], -torch.inf)


def are_allowed(tokens: Tensor, allowed: Tensor) -> Tensor:
    """Whether a mask allows each row's token, [R] bool; `allowed` as `DrawSettings.allowed`."""
    tokens = tokens.clamp(min=0)
    words = allowed.gather(1, (tokens >> 5)[:, None])[:, 0]
    return (words >> (tokens & 31)) & 1 == 1


def _bits(words: Tensor) -> Tensor:
    """[R, W] int32 -> [R, 32 * W] bool, the lowest bit of each word first."""
    if words.device.type == "cpu":  # five times as fast as shifts
        packed = words.contiguous().numpy().view(np.uint8)
        return torch.from_numpy(np.unpackbits(packed, axis=1, bitorder="little").view(np.bool_))
    order = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> order) & 1 == 1).flatten(1)


def keep(scaled: Tensor, settings: DrawSettings) -> Tensor:
    """Set everything outside top-k, top-p and min-p to -inf; `scaled` [R, V] after temperature.
    Masses are summed in float64."""
    R, V = scaled.shape
    ordered = scaled.sort(dim=1, descending=True).values
    threshold = torch.full_like(ordered[:, :1], -torch.inf)  # [R, 1]
    top_k = torch.full((R,), V, device=scaled.device) if settings.top_k is None else settings.top_k
    if settings.top_k is not None:
        threshold = ordered.gather(1, (top_k.clamp(max=V) - 1)[:, None])
    if settings.top_p is not None:
        mass = (ordered - ordered[:, :1]).double().exp()
        mass = mass.masked_fill(torch.arange(V, device=scaled.device) >= top_k[:, None], 0.0)
        upto = mass.cumsum(dim=1)
        reached = upto >= settings.top_p.double()[:, None] * upto[:, -1:]
        lowest = ordered.gather(1, reached.int().argmax(dim=1, keepdim=True))
        lowest = lowest.masked_fill((settings.top_p >= 1)[:, None], -torch.inf)
        threshold = torch.maximum(threshold, lowest)
    if settings.min_p is not None:
        threshold = torch.maximum(threshold, ordered[:, :1] + settings.min_p.log()[:, None])
    return scaled.masked_fill(scaled < threshold, -torch.inf)
