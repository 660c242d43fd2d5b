"""EAGLE-3's training-time test: the head drafts several steps ahead, on its own states.

Entry i of a head is computed from token i and the feature of token i - 1; it predicts token i + 1.
In step j, the row with base position t computes entry t + j from token t + j and the state of step
j - 1, as if the last j tokens were drafted and accepted. It sees the true entries up to t, then its
own entries of steps 1 to j (arXiv:2503.01840). A P-EAGLE head sees the same, but its entries of
steps 1 to j are made from a mask token and a learnt feature (`DraftNetwork.next_entry`).

Which rows and tokens a step needs is found on the host, before anything runs on the device, so that
the host never waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.train.head.network import DraftNetwork, StepKeys
from engine.copies import upload

FIRST_ENTRY = 1  # token 0 has no feature before it


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """B rows of S tokens with the target's features. A row is one text, followed by padding, or
    several texts one after the other."""

    token_ids: Tensor  # [B, S] int64
    is_answer: Tensor  # [B, S] bool, on the host: tokens that the target wrote; False in padding
    starts: Tensor  # [B, S] int64, on the host: the place of the first token of each token's text
    taps: Tensor  # [B, S, feature_size]
    hidden: Tensor  # [B, S, H target], after the final norm
    best: Tensor  # [B, S] int64, the target's likeliest next token


@dataclass(frozen=True, slots=True)
class UnrolledStepPlan:
    """What one step predicts; `counts` marks rows with a token to predict, N in all."""

    places: Tensor  # [B, R] int64, the place t + j whose next token is predicted
    positions: Tensor  # [B, R] int64, its position in its text
    counts: Tensor  # [B, R] bool
    picked: Tensor  # [N] int64, the rows that count, of all B * R
    predicting: Tensor  # [N] int64, their numbers in `UnrollPlan.predicting`


@dataclass(frozen=True, slots=True)
class UnrollPlan:
    """What unrolling a batch computes."""

    rows: Tensor  # [B, R] int64, base places, see `base_rows`
    first: Tensor  # [B, R] int32: base place t sees the entries from this one, 1 of its text,
    last: Tensor  # ... to t; padding sees one, to stay finite
    positions: Tensor  # [B, S] int64, of every token in its text
    predicting: Tensor  # [M] int64, of all B * S: the places before answer tokens
    steps: tuple[UnrolledStepPlan, ...]


@dataclass(frozen=True, slots=True)
class UnrolledStep:
    """The drafts of step j for all rows."""

    states: Tensor  # [B, R, H]
    head_inputs: Tensor  # [B, R, H]
    plan: UnrolledStepPlan


def base_rows(batch: TrainBatch, num_steps: int) -> Tensor:
    """[B, R] base places from which some step predicts an answer token, padded with 0."""
    batch_size, length = batch.is_answer.shape
    useful = torch.zeros(batch_size, length, dtype=torch.bool)
    for step in range(num_steps):
        ahead = batch.is_answer[:, step + 1 :]
        same = batch.starts[:, step + 1 :] == batch.starts[:, : ahead.shape[1]]
        useful[:, : ahead.shape[1]] |= ahead & same
    useful &= torch.arange(length) >= batch.starts + FIRST_ENTRY
    width = max(1, int(useful.sum(dim=1).max()))
    places = torch.arange(length).where(useful, length)
    rows = places.sort(dim=1).values[:, :width]
    return rows.where(rows < length, 0)


def plan_unrolling(batch: TrainBatch, num_steps: int) -> UnrollPlan:
    """The plan of `num_steps` steps, on the batch's device."""
    batch_size, length = batch.is_answer.shape
    rows = base_rows(batch, num_steps)
    starts = batch.starts.gather(1, rows)
    first = starts + FIRST_ENTRY
    before_answers = torch.zeros(batch_size, length, dtype=torch.bool)
    before_answers[:, :-1] = batch.is_answer[:, 1:]
    predicting = before_answers.flatten().nonzero().flatten()
    numbers = before_answers.flatten().cumsum(0) - 1
    plan = UnrollPlan(
        rows=rows,
        first=first.int(),
        last=rows.maximum(first).int(),
        positions=torch.arange(length) - batch.starts,
        predicting=predicting,
        steps=tuple(
            _plan_step(batch, rows, starts, numbers.view(batch_size, length), step)
            for step in range(num_steps)
        ),
    )
    return upload(plan, batch.token_ids.device)


def _plan_step(
    batch: TrainBatch, rows: Tensor, starts: Tensor, numbers: Tensor, step: int
) -> UnrolledStepPlan:
    length = batch.is_answer.shape[1]
    places, predicted = rows + step, rows + step + 1
    found = predicted.clamp(max=length - 1)
    counts = (rows >= starts + FIRST_ENTRY) & (predicted < length)
    counts &= (batch.starts.gather(1, found) == starts) & batch.is_answer.gather(1, found)
    places = places.clamp(max=length - 1)
    return UnrolledStepPlan(
        places=places,
        positions=rows + step - starts,
        counts=counts,
        picked=counts.flatten().nonzero().flatten(),
        predicting=numbers.gather(1, places)[counts],
    )


def unroll(network: DraftNetwork, batch: TrainBatch, plan: UnrollPlan) -> Iterator[UnrolledStep]:
    """Yield the steps in order; the autograd graph runs through all of them."""
    features = shifted(network.fuse(batch.taps))
    states, inputs, seen = _true_entries(network, batch, features, plan)
    yield UnrolledStep(states, inputs, plan.steps[0])
    for step in plan.steps[1:]:
        token_ids = batch.token_ids.gather(1, step.places)
        x, stream = network.enter(*network.next_entry(token_ids, states))
        rotary = network.rotary[step.positions]
        for index, keys in enumerate(seen):
            layer = network.layer(index)
            x = network.layer_input(index, x, stream)
            keys.later.append(layer.self_attn.keys_values(x, rotary))
            stream = layer(x, stream, rotary, keys)
        states, inputs = network.leave(stream)
        yield UnrolledStep(states, inputs, step)


def shifted(features: Tensor) -> Tensor:
    """[B, S, H] features of tokens -> features of the token before each; zeros for the first. The
    first entry of a later text in the row gets another text's, but nothing sees it."""
    return torch.cat((torch.zeros_like(features[:, :1]), features[:, :-1]), dim=1)


def _true_entries(
    network: DraftNetwork, batch: TrainBatch, features: Tensor, plan: UnrollPlan
) -> tuple[Tensor, Tensor, list[StepKeys]]:
    """Step 0: compute all entries, but the last layer's output and `leave` only for `plan.rows`."""
    batch_size, length = batch.token_ids.shape
    everyone = torch.arange(length, device=features.device).expand(batch_size, length)
    first = (everyone - plan.positions + FIRST_ENTRY).int()
    num_layers = len(network.layers)
    rotary = network.rotary[plan.positions]
    seen: list[StepKeys] = []
    x, stream = network.enter(batch.token_ids, features)
    for index in range(num_layers):
        layer = network.layer(index)
        x = network.layer_input(index, x, stream)
        keys, values = layer.self_attn.keys_values(x, rotary)
        rows_see = StepKeys(keys, values, plan.first, plan.last)
        seen.append(rows_see)
        if index < num_layers - 1:
            all_see = StepKeys(keys, values, first, everyone.maximum(first).int())
            stream = layer(x, stream, rotary, all_see)
        else:
            own = network.rotary[plan.steps[0].positions]
            stream = layer(_pick(x, plan.rows), _pick(stream, plan.rows), own, rows_see)
    return *network.leave(stream), seen


def _pick(values: Tensor, rows: Tensor) -> Tensor:
    return values.gather(1, rows.unsqueeze(-1).expand(*rows.shape, values.shape[-1]))
