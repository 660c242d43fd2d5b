"""From logits to one token per row, with every feature of a request, in plain torch.

Order: repetition penalty, frequency and presence penalties, bias, grammar mask, temperature, then
top-k, top-p (over what top-k kept) and min-p, then the arg-max with the noise of (seed, position).
Every filter is a threshold on the scaled logits of its row; tokens that tie with the last one kept
are kept too, so a token t is drawn only if

    fewer than top_k tokens lie strictly above t, and
    the mass strictly above t is below top_p of the mass of the best top_k tokens, and
    t >= highest + log(min_p).

Nothing here waits for the device: no shape depends on values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sampling.reference import gumbel_argmax, noise_keys

ABSENT = -1  # count of a token that is neither in the prompt nor in the output


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Changes to the logits of R rows. Row r owns the entries offsets[r] .. offsets[r+1]-1, at
    most one for each token id: what its own path has seen of the token, and the token's bias."""

    offsets: Tensor  # [R + 1] int32
    ids: Tensor  # [E] int32, those behind offsets[R] are not looked at
    counts: Tensor  # [E] int32 in the output; 0: in the prompt only; ABSENT: in neither
    bias: Tensor  # [E] float32 to add, 0 without; -inf forbids the token
    repetition: Tensor  # [R] float32, 1 is off
    frequency: Tensor  # [R] float32, 0 is off
    presence: Tensor  # [R] float32, 0 is off


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """How the tokens of R rows are drawn. Parts that no row uses may be None."""

    temperature: Tensor  # [R] float32, 0 is greedy: the highest edited logit, no noise
    seeds: Tensor  # [R] int64, the bits of the unsigned seed
    positions: Tensor  # [R] int64 absolute position of the token to draw
    top_k: Tensor | None = None  # [R] int64, V when off
    top_p: Tensor | None = None  # [R] float32, 1 when off
    min_p: Tensor | None = None  # [R] float32, 0 when off
    edits: LogitEdits | None = None
    allowed: Tensor | None = None  # [R, ceil(V / 32)] int32, bit v % 32 of word v // 32: token v
    any_sampled: bool = True  # False: all rows are greedy; True: some may not be
    any_greedy: bool = True  # False: no row is; True: some may be

    @property
    def is_filtered(self) -> bool:
        return self.top_k is not None or self.top_p is not None or self.min_p is not None


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn; log-probabilities are of the raw logits, before edits and temperature."""

    tokens: Tensor  # [R] int64
    logprobs: Tensor | None  # [R] float32 of the drawn tokens
    top_ids: Tensor | None  # [R, n] int64, the best first, the lower id among equals
    top_logprobs: Tensor | None  # [R, n] float32


def draw(logits: Tensor, settings: DrawSettings, num_top: int | None = None) -> Drawn:
    """Draw one token per row of `logits` [R, V] float32, which are left as they are.

    Args:
        num_top: how many of the likeliest tokens to report; None: no log-probabilities at all.
    """
    tokens = draw_edited(edit(logits, settings), settings)
    if num_top is None:
        return Drawn(tokens, None, None, None)
    normaliser = logits.logsumexp(dim=1)
    logprobs = logits.gather(1, tokens[:, None])[:, 0] - normaliser
    if num_top == 0:
        return Drawn(tokens, logprobs, None, None)
    best, ids = logits.sort(dim=1, descending=True, stable=True)
    return Drawn(tokens, logprobs, ids[:, :num_top], best[:, :num_top] - normaliser[:, None])


def draw_tokens(logits: Tensor, settings: DrawSettings) -> Tensor:
    """The operation `draw`: [R] int64 tokens."""
    return draw_edited(edit(logits, settings), settings)


def edit(logits: Tensor, settings: DrawSettings) -> Tensor:
    """The logits after penalties, bias and grammar mask: a changed copy."""
    edited = logits.clone() if settings.edits is None else _with_edits(logits, settings.edits)
    if settings.allowed is not None:
        tokens = torch.arange(logits.shape[1], device=logits.device)
        words = settings.allowed[:, tokens // 32]  # [R, V]
        edited.masked_fill_((words >> (tokens % 32)) & 1 == 0, -torch.inf)
    return edited


def _with_edits(logits: Tensor, edits: LogitEdits) -> Tensor:
    """Repetition (arXiv:1909.05858) over prompt and output; frequency and presence over the output,
    as the OpenAI API defines them: subtract count * frequency + (count > 0) * presence."""
    entries = torch.arange(len(edits.ids), device=logits.device)
    used = entries < edits.offsets[-1]
    rows = torch.searchsorted(edits.offsets[1:].contiguous(), entries, right=True)
    rows = rows.clamp(max=len(logits) - 1)
    ids, counts = torch.where(used, edits.ids, 0).long(), edits.counts
    raw = logits[rows, ids]
    repetition = edits.repetition[rows]
    values = torch.where(raw > 0, raw / repetition, raw * repetition)
    values = values - counts * edits.frequency[rows]
    values = values - (counts > 0) * edits.presence[rows]
    values = torch.where(counts >= 0, values, raw) + edits.bias
    # Unused entries go to a column of their own, so that they meet no used one.
    columns = torch.where(used, ids, logits.shape[1])
    wide = torch.cat((logits, logits[:, :1]), dim=1)
    return wide.index_put((rows, columns), values)[:, : logits.shape[1]]


def draw_edited(edited: Tensor, settings: DrawSettings) -> Tensor:
    """[R] tokens of edited logits: the best one of greedy rows, a draw of the others."""
    sampled = settings.temperature > 0
    scaled = edited / torch.where(sampled, settings.temperature, 1.0)[:, None]
    keys = noise_keys(settings.seeds, settings.positions)
    drawn = gumbel_argmax(keep(scaled, settings), keys)
    return torch.where(sampled, drawn, edited.argmax(dim=1))


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
