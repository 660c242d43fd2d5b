"""From raw logits to the distribution that a request asked for.

Order: repetition penalty, presence and frequency penalties, logit bias, forbidden tokens,
temperature, then top-k, top-p (over what top-k kept) and min-p. Every filter is a threshold on the
logits of its own row, so the result does not depend on the other rows of the batch; tokens that tie
with the last one kept are kept too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.sampling.batch import Penalties, SamplingBatch

FIRST_WIDTH = 256  # candidates looked at before a wider search for the top-p mass


def edit_logits(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Apply penalties, bias and forbidden tokens. Returns `logits` itself when there are none,
    otherwise a changed copy (the raw values are still needed for logprobs)."""
    if batch.penalties is None and batch.bias is None and batch.forbidden is None:
        return logits
    logits = logits.clone()
    if batch.penalties is not None:
        _penalise(logits, batch.penalties)
    if batch.bias is not None:
        at, values = batch.bias
        logits.index_put_((at.rows, at.ids), values, accumulate=True)
    if batch.forbidden is not None:
        logits[batch.forbidden.rows, batch.forbidden.ids] = -torch.inf
    return logits


def _penalise(logits: Tensor, penalties: Penalties) -> None:
    """Repetition (arXiv:1909.05858) over prompt and output; frequency and presence over the output,
    as the OpenAI API defines them: subtract count * frequency + (count > 0) * presence."""
    at = (penalties.at.rows, penalties.at.ids)
    values = logits[at]
    repetition = penalties.repetition
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= penalties.counts * penalties.frequency
    values -= (penalties.counts > 0) * penalties.presence
    logits[at] = values


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
    """Wide enough for every top-k that is on; a first guess for top-p without top-k."""
    largest_k = int(torch.where(top_k < vocab_size, top_k, 1).max())
    guess = FIRST_WIDTH if bool(((top_p < 1) & (top_k >= vocab_size)).any()) else 1
    return min(vocab_size, max(largest_k, guess))


def _threshold(scaled: Tensor, best: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, bool]:
    """The smallest logit that top-k and top-p keep, [R]; False when `best` is too narrow to say."""
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
    # Keep a token while the mass in front of it is below top_p: the first one is always kept.
    reached = mass >= (top_p * total)[:, None]
    complete = bool((reached.any(dim=1) | ~has_p | has_k).all())
    first = torch.where(reached.any(dim=1), reached.int().argmax(dim=1), width - 1)
    top_p_threshold = torch.where(has_p, best.gather(1, first[:, None])[:, 0], lowest)
    return torch.maximum(threshold, top_p_threshold), complete
