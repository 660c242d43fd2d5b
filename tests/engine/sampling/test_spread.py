"""Sampling spread over ranks draws and scores the same tokens as one rank."""

from __future__ import annotations

import pytest
import torch

from engine.parallel.shard import Shard
from engine.runner.step import shared
from engine.sampling.spread import SpreadLogits, row_counts
from engine.speculation.proposer import Drafted
from engine.step.shape import chain
from kernels.ops import Ops
from kernels.sampling.settings import Scores
from tests.engine.test_speculation_equality import SETTINGS
from tests.support.drafts.trees import filled
from tests.support.engines.in_process import ask
from tests.support.engines.told_target import Text, sample
from tests.support.ranks.thread_group import ThreadGroup, run_ranks

VOCAB = 131


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 8, 64])
def test_every_row_belongs_to_one_rank(num_rows: int, size: int) -> None:
    counts = row_counts(num_rows, size)
    assert (len(counts), sum(counts)) == (size, num_rows)
    assert max(counts) - -(-num_rows // size) == 0


def texts(per_row: int) -> list[Text]:
    """One request of every kind, with a chain of `per_row` nodes."""
    parents = tuple(range(-1, per_row - 1))
    return [
        Text(
            ask(name, [3, 5, 5, at + 7], **({"seed": at} | settings)),
            (9, 9, at + 4),
            (parents, tuple((at * per_row + node) % VOCAB for node in range(per_row))),
        )
        for at, (name, settings) in enumerate(SETTINGS.items())
    ]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("per_row", [1, 3])
def test_ranks_draw_and_score_what_one_rank_does(
    reference_ops: Ops, size: int, per_row: int
) -> None:
    rows, ops = texts(per_row), reference_ops
    num_nodes = len(rows) * per_row
    logits = 3 * torch.randn(num_nodes, VOCAB, generator=torch.Generator().manual_seed(1))
    alone = sample(ops, rows, logits, eos=[2])
    settings, edits = alone.settings, alone.edits
    assert settings is not None
    assert edits is not None
    at = torch.tensor([0, num_nodes - 1, 3, 3])
    tokens = torch.tensor(alone.drawn)[at]
    named = torch.stack([tokens, (tokens + 5) % VOCAB], dim=1)
    values = logits[at].log_softmax(dim=1).gather(1, named)
    scores = ops.score(logits[at], tokens, 3)

    def on_rank(group: ThreadGroup) -> tuple[list[int], Scores]:
        shard = Shard(group.rank, size)
        local = torch.full((num_nodes, shard.padded_width(VOCAB)), torch.nan)
        part = logits[:, shard.padded(VOCAB)]
        local[:, : part.shape[1]] = part
        spread = SpreadLogits.of(local, VOCAB, group, ops)
        assert spread.own.shape[1] == VOCAB
        assert len(spread.own) < num_nodes
        return spread.draw(settings, edits).tolist(), spread.score(at, tokens, 3, named)

    for drawn, found in run_ranks(size, on_rank):
        assert drawn == alone.drawn
        assert torch.equal(found.chosen, scores.chosen)
        assert torch.equal(found.top_ids, torch.cat([scores.top_ids, named], dim=1))
        assert torch.equal(found.top[:, :3], scores.top)
        assert torch.equal(found.top[:, 3], scores.chosen)
        torch.testing.assert_close(found.top[:, 4], values[:, 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_rank_without_rows_takes_part(reference_ops: Ops, num_rows: int) -> None:
    rows = texts(1)[:num_rows]
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(2))
    alone = sample(reference_ops, rows, logits)
    at, tokens = torch.arange(num_rows), torch.tensor(alone.drawn)
    scores = reference_ops.score(logits, tokens, 2)

    def on_rank(group: ThreadGroup) -> tuple[list[int], Scores]:
        shard = Shard(group.rank, 4)
        local = torch.full((num_rows, shard.padded_width(VOCAB)), torch.nan)
        part = logits[:, shard.padded(VOCAB)]
        local[:, : part.shape[1]] = part
        spread = SpreadLogits.of(local, VOCAB, group, reference_ops)
        assert alone.settings is not None
        return spread.draw(alone.settings, alone.edits).tolist(), spread.score(at, tokens, 2)

    for drawn, found in run_ranks(4, on_rank):
        assert drawn == alone.drawn
        for part in ("chosen", "top_ids", "top"):
            assert torch.equal(getattr(found, part), getattr(scores, part)), part


def test_every_rank_gets_the_trees_of_rank_0() -> None:
    def own_trees(rank: int) -> Drafted:
        """Ranks disagree on tokens, numbers of nodes, and faults."""
        tokens = torch.arange(8).view(2, 4) + 10 * rank
        tree = filled(chain(3), tokens, torch.tensor([4 - rank, 1]))
        return Drafted(tree, torch.tensor([rank > 0, rank == 0]))

    def on_rank(group: ThreadGroup) -> Drafted:
        return shared(own_trees(group.rank), group)

    first = own_trees(0)
    for found in run_ranks(3, on_rank):
        assert found.tree.max_depth == first.tree.max_depth
        for part in ("tokens", "parents", "depths", "sizes", "ancestors"):
            assert torch.equal(getattr(found.tree, part), getattr(first.tree, part)), part
        assert torch.equal(found.faults, first.faults)
