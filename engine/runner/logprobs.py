"""Log-probabilities for the rows that asked: of emitted tokens, and of prompt tokens (echo)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.messages import TokenLogprob
from engine.models.interface import TargetModel
from engine.request import Request
from engine.sampling.sampler import Sampler
from engine.sampling.spread import SpreadLogits
from engine.step.batch import ForwardContext
from engine.step.plan import RowPlan
from engine.transfer import upload


def emitted_logprobs(
    sampler: Sampler,
    logits: SpreadLogits,
    at: Tensor,
    emitted: Sequence[Sequence[int]],
    counts: Sequence[int | None],
) -> list[tuple[TokenLogprob, ...] | None]:
    """The logprobs of every emitted token; None for rows whose `counts` is None.

    Args:
        logits: raw ones of all R nodes.
        at: [B, max_depth + 1] where in R the node lies that emitted token i of a row; on the host.
        emitted: B lists of tokens.
        counts: B numbers of alternatives.
    """
    entries: list[tuple[TokenLogprob, ...] | None] = [None] * len(counts)
    wanted = [(row, count) for row, count in enumerate(counts) if count is not None]
    if not wanted:
        return entries
    widest = max(count for _, count in wanted)
    flat = [node for row, _ in wanted for node in at[row].tolist()[: len(emitted[row])]]
    tokens = [token for row, _ in wanted for token in emitted[row]]
    places, ids = upload((torch.tensor(flat), torch.tensor(tokens)), logits.own.device)
    scored = logits.logprobs(sampler, places, ids, widest)
    first = 0
    for row, count in wanted:
        part = scored[first : first + len(emitted[row])]
        entries[row] = tuple(TokenLogprob(e.token_id, e.logprob, e.top[:count]) for e in part)
        first += len(part)
    return entries


def prompt_logprobs(
    row: RowPlan,
    request: Request,
    hidden: Tensor,
    model: TargetModel,
    vocab_size: int,
    sampler: Sampler,
    ctx: ForwardContext,
) -> tuple[TokenLogprob, ...]:
    """Score the prompt tokens that this row's chunk predicts, from its `hidden` [len, H]."""
    targets = request.prompt_ids[row.start + 1 : row.start + 1 + len(row.token_ids)]
    if not targets or request.params.prompt_logprobs is None:
        return ()
    local = model.logits(hidden[: len(targets)], ctx)
    logits = SpreadLogits.of(local, vocab_size, ctx.group)
    tokens = upload(torch.tensor(targets, dtype=torch.int64), local.device)
    at = torch.arange(len(targets), device=local.device)
    return tuple(logits.logprobs(sampler, at, tokens, request.params.prompt_logprobs))
