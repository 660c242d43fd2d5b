"""Log-probabilities for the rows that asked: of emitted tokens, and of prompt tokens (echo)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.messages import TokenLogprob
from engine.models.interface import TargetModel
from engine.request import Request
from engine.runner.forward import ForwardContext
from engine.sampling.sampler import Sampler
from engine.scheduler.plan import RowPlan


def emitted_logprobs(
    sampler: Sampler, logits: Tensor, tokens: Tensor, counts: Sequence[int | None]
) -> list[TokenLogprob | None]:
    """One entry per node; None where `counts` is None.

    Args:
        logits: [R, V] raw logits.
        tokens: [R] what each node emitted.
        counts: R numbers of alternatives.
    """
    entries: list[TokenLogprob | None] = [None] * len(counts)
    wanted = [(node, count) for node, count in enumerate(counts) if count is not None]
    if not wanted:
        return entries
    nodes = torch.tensor([node for node, _ in wanted], device=logits.device)
    widest = max(count for _, count in wanted)
    scored = sampler.logprobs(logits[nodes], tokens.to(logits.device)[nodes], widest)
    for (node, count), entry in zip(wanted, scored, strict=True):
        entries[node] = TokenLogprob(entry.token_id, entry.logprob, entry.top[:count])
    return entries


def prompt_logprobs(
    row: RowPlan,
    request: Request,
    hidden: Tensor,
    model: TargetModel,
    sampler: Sampler,
    ctx: ForwardContext,
) -> tuple[TokenLogprob, ...]:
    """Score the prompt tokens that this row's chunk predicts, from its `hidden` [len, H]."""
    targets = request.prompt_ids[row.start + 1 : row.start + 1 + len(row.token_ids)]
    if not targets or request.params.prompt_logprobs is None:
        return ()
    logits = model.logits(hidden[: len(targets)], ctx)
    tokens = torch.tensor(targets, dtype=torch.int64, device=logits.device)
    return tuple(sampler.logprobs(logits, tokens, request.params.prompt_logprobs))
