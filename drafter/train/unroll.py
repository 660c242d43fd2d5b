"""EAGLE-3's training-time test: the head drafts several steps ahead, on its own states.

Entry i of a head is computed from token i and the feature of token i - 1; it predicts token i + 1.
In step j, the row with base position t computes entry t + j from token t + j and the state of step
j - 1, as if the last j tokens were drafted and accepted. It sees the true entries up to t, then its
own entries of steps 1 to j (arXiv:2503.01840). A P-EAGLE head sees the same, but its entries of
steps 1 to j are made from a mask token and a learnt feature (`DraftNetwork.next_entry`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.train.network import DraftNetwork, StepKeys

FIRST_ENTRY = 1  # token 0 has no feature before it


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """B texts, padded to S tokens, with the target's features."""

    token_ids: Tensor  # [B, S] int64
    is_answer: Tensor  # [B, S] bool: tokens that the target wrote; False after a text's end
    taps: Tensor  # [B, S, feature_size]
    hidden: Tensor  # [B, S, H target], after the final norm
    best: Tensor  # [B, S] int64, the target's likeliest next token


@dataclass(frozen=True, slots=True)
class UnrolledStep:
    """The drafts of step j for all rows; `counts` marks rows with a token to predict."""

    states: Tensor  # [B, R, H]
    head_inputs: Tensor  # [B, R, H]
    places: Tensor  # [B, R] int64, the position t + j whose next token is predicted
    counts: Tensor  # [B, R] bool, False if there is no token to predict


def base_rows(batch: TrainBatch, num_steps: int) -> Tensor:
    """[B, R] base positions from which some step predicts an answer token, padded with 0."""
    batch_size, length = batch.token_ids.shape
    useful = torch.zeros(batch_size, length, dtype=torch.bool, device=batch.token_ids.device)
    for step in range(num_steps):
        ahead = batch.is_answer[:, step + 1 :]
        useful[:, : ahead.shape[1]] |= ahead
    useful[:, :FIRST_ENTRY] = False
    width = max(1, int(useful.sum(dim=1).max()))
    places = torch.arange(length, device=useful.device).where(useful, length)
    rows = places.sort(dim=1).values[:, :width]
    return rows.where(rows < length, 0)


def unroll(network: DraftNetwork, batch: TrainBatch, num_steps: int) -> Iterator[UnrolledStep]:
    """Yield the steps in order; the autograd graph runs through all of them."""
    rows = base_rows(batch, num_steps)
    features = shifted(network.fuse(batch.taps))
    states, inputs, seen = _true_entries(network, batch, features, rows)
    yield _step(states, inputs, batch, rows, 0)
    for step in range(1, num_steps):
        places = (rows + step).clamp(max=batch.token_ids.shape[1] - 1)
        x, stream = network.enter(*network.next_entry(batch.token_ids.gather(1, places), states))
        rotary = network.rotary[rows + step]
        for index, keys in enumerate(seen):
            layer = network.layer(index)
            x = network.layer_input(index, x, stream)
            keys.later.append(layer.self_attn.keys_values(x, rotary))
            stream = layer(x, stream, rotary, keys)
        states, inputs = network.leave(stream)
        yield _step(states, inputs, batch, rows, step)


def shifted(features: Tensor) -> Tensor:
    """[B, S, H] features of tokens -> features of the token before each; zeros for the first."""
    return torch.cat((torch.zeros_like(features[:, :1]), features[:, :-1]), dim=1)


def _true_entries(
    network: DraftNetwork, batch: TrainBatch, features: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, list[StepKeys]]:
    """Step 0: compute all entries, but the last layer's output and `leave` only for `rows`."""
    batch_size, length = batch.token_ids.shape
    everyone = torch.arange(length, device=rows.device).expand(batch_size, length)
    num_layers = len(network.layers)
    rows_see, all_see = visible(rows, length), visible(everyone, length)
    seen: list[StepKeys] = []
    x, stream = network.enter(batch.token_ids, features)
    for index in range(num_layers):
        layer = network.layer(index)
        x = network.layer_input(index, x, stream)
        last = index == num_layers - 1
        own = rows if last else everyone
        keys, values = layer.self_attn.keys_values(x, network.rotary[everyone])
        here = StepKeys(keys, values, rows_see if last else all_see)
        x, stream = _pick(x, own), _pick(stream, own)
        stream = layer(x, stream, network.rotary[own], here)
        seen.append(StepKeys(keys, values, rows_see))
    return *network.leave(stream), seen


def visible(rows: Tensor, length: int) -> Tensor:
    """[B, R, S]: base position t sees entries 1 to t; 0 (padding) sees one, to stay finite."""

    places = torch.arange(length, device=rows.device)
    last = rows.clamp(min=FIRST_ENTRY).unsqueeze(-1)
    return (places >= FIRST_ENTRY) & (places <= last)


def _pick(values: Tensor, rows: Tensor) -> Tensor:
    return values.gather(1, rows.unsqueeze(-1).expand(*rows.shape, values.shape[-1]))


def _step(
    states: Tensor, inputs: Tensor, batch: TrainBatch, rows: Tensor, step: int
) -> UnrolledStep:
    length = batch.token_ids.shape[1]
    predicted = rows + step + 1
    inside = (rows >= FIRST_ENTRY) & (predicted < length)
    counts = inside & batch.is_answer.gather(1, predicted.clamp(max=length - 1))
    return UnrolledStep(states, inputs, (rows + step).clamp(max=length - 1), counts)
