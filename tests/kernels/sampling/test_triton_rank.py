"""Triton's ranking of drafts, in two launches, against the composition of the references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.ops import Ops
from kernels.sampling.rank.ranking import NodeDraws
from kernels.sampling.settings import DrawSettings
from tests.kernels import triton_env

rank = triton_env.load("kernels.sampling.rank.triton_rank")
noisy = triton_env.load("kernels.sampling.rank.triton_noisy")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]
DEVICE = triton_env.DEVICE
B, VOCAB, TILE = 3, 333, 128  # several tiles without a large vocabulary


def rows(*, filtered: bool, any_sampled: bool = True) -> DrawSettings:
    """A greedy row and two others."""

    def new(*values: float) -> Tensor:
        return torch.tensor(values, device=DEVICE)

    settings = DrawSettings(
        new(0.0, 1.0, 0.6), new(7, -3, 9), new(50, 51, 52), any_sampled=any_sampled
    )
    if not filtered:
        return settings
    return replace(settings, top_k=new(5, VOCAB, 7), top_p=new(0.9, 0.7, 1), min_p=new(0, 0, 0.01))


def logits_of(num_nodes: int, dtype: torch.dtype) -> Tensor:
    logits = triton_env.numbers(num_nodes, VOCAB, seed=num_nodes) * 3
    logits[0, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    logits[-1, 20:200] = 2.0  # equals
    return logits.to(dtype)


def composed(
    logits: Tensor, draws: NodeDraws, ids: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """Of the noise that the kernels themselves add, so that ties and near ties are alike."""
    values = logits.float()
    if draws.rows.any_sampled:
        values = noisy.add_noise(values, draws.settings(len(logits)), ids)
    values = torch.where(values.isnan(), -torch.inf, values)
    best = values.sort(dim=1, descending=True, stable=True)
    tokens = best.indices[:, :count]
    scores = best.values[:, :count] - values.logsumexp(dim=1, keepdim=True)
    return tokens if ids is None else ids[tokens], scores


@pytest.mark.parametrize("kind", ["greedy", "noisy", "filtered"])
@pytest.mark.parametrize(("per_row", "count"), [(1, 1), (4, 6)])
def test_the_best_tokens_and_their_scores(kind: str, per_row: int, count: int) -> None:
    """For whole rows, and for a part of their nodes."""
    settings = rows(filtered=kind == "filtered", any_sampled=kind != "greedy")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(2000, generator=generator)[:VOCAB].to(DEVICE)
    dtype = torch.bfloat16 if per_row == 1 else torch.float32
    logits, step = logits_of(B * per_row, dtype), int(per_row > 1)
    for begin, target_ids in ((0, ids), (per_row, None)):
        draws = NodeDraws(settings, per_row, 3, step, begin)
        part = triton_env.spaced(logits[begin:])
        tokens, scores = composed(part, draws, target_ids, count)
        plain = rank.rank_drafts(part, draws, target_ids, count, False, tile=TILE)
        scored = rank.rank_drafts(part, draws, target_ids, count, True, tile=TILE)
        assert plain.scores is None
        assert plain.tokens.tolist() == scored.tokens.tolist() == tokens.tolist()
        # After an infinite logit no score is a number; trees take NaN for -inf.
        assert scored.scores is not None
        got, expected = (torch.where(s.isnan(), -torch.inf, s) for s in (scored.scores, scores))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_it_guesses_as_the_reference_does(reference_ops: Ops) -> None:
    """Apart from near ties, since the noise is rough."""
    draws = NodeDraws(rows(filtered=True), 40, 1, 0)
    logits = triton_env.numbers(B * 40, VOCAB, seed=8) * 3
    got = rank.rank_drafts(logits, draws, None, 2, True)
    expected = reference_ops.rank_drafts(logits, draws, None, 2, True)
    assert (got.tokens == expected.tokens).float().mean() > 0.98
    assert expected.scores is not None
    torch.testing.assert_close(got.scores, expected.scores, atol=5e-3, rtol=0)


def test_fewer_tokens_than_asked_for_are_all_of_them() -> None:
    draws = NodeDraws(rows(filtered=False, any_sampled=False), 1, 1)
    logits = torch.tensor([[1.0, 3.0, 2.0]] * B, device=DEVICE)
    got = rank.rank_drafts(logits, draws, None, 5, True)
    assert got.tokens.tolist() == [[1, 2, 0]] * B
