"""Sampling spread over ranks draws and scores what one rank would."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.parallel.shard import Shard
from engine.parallel.trees import share_tree
from engine.sampling.batch import draw_settings
from engine.sampling.rows import RowState
from engine.sampling.sampler import Sampler
from engine.sampling.spread import SpreadLogits, row_counts
from engine.step.shape import DynamicShape, chain
from engine.step.tree import DraftTree
from kernels.ops import Ops
from tests.engine.test_speculation_equality import SETTINGS
from tests.support.engines import ask
from tests.support.thread_group import ThreadGroup, run_ranks

VOCAB = 131
CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 8, 64])
def test_every_row_belongs_to_one_rank(num_rows: int, size: int) -> None:
    counts = row_counts(num_rows, size)
    assert (len(counts), sum(counts)) == (size, num_rows)
    assert max(counts) - -(-num_rows // size) == 0


def states() -> list[RowState]:
    return [
        RowState.admit(ask(name, [3, 5, 5, at + 7], **({"seed": at} | settings)), (9, 9, at + 4))
        for at, (name, settings) in enumerate(SETTINGS.items())
    ]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("per_row", [1, 3])
def test_ranks_draw_and_score_what_one_rank_does(
    reference_ops: Ops, size: int, per_row: int
) -> None:
    rows, sampler = states(), Sampler(reference_ops)
    tokens = torch.arange(len(rows) * per_row).view(len(rows), per_row) % VOCAB
    sizes = torch.full((len(rows),), per_row)
    tree = DraftTree.of_shape(chain(per_row - 1), tokens, sizes)
    num_nodes = len(rows) * per_row
    logits = 3 * torch.randn(num_nodes, VOCAB, generator=torch.Generator().manual_seed(1))
    settings = draw_settings(rows, tree, [2], VOCAB)
    at = torch.tensor([0, num_nodes - 1, 3, 3])
    expected = sampler.draw(logits, settings)
    scores = sampler.logprobs(logits[at], expected[at], 3)

    def on_rank(group: ThreadGroup) -> tuple[list[int], object]:
        shard = Shard(group.rank, size)
        local = torch.full((num_nodes, shard.padded_width(VOCAB)), torch.nan)
        part = logits[:, shard.padded(VOCAB)]
        local[:, : part.shape[1]] = part
        spread = SpreadLogits.of(local, VOCAB, group)
        assert spread.own.shape[1] == VOCAB
        assert len(spread.own) < num_nodes
        drawn = spread.draw(sampler, settings)
        return drawn.tolist(), spread.logprobs(sampler, at, expected[at], 3)

    for drawn, found in run_ranks(size, on_rank):
        assert drawn == expected.tolist()
        assert found == scores


def test_every_rank_gets_the_trees_of_rank_0() -> None:
    shape = DynamicShape("dynamic9", 9, 3, 4)

    def own_tree(rank: int) -> DraftTree:
        """Ranks disagree on the tokens and on how many nodes there are."""
        width = 4 - rank
        tokens = torch.arange(2 * width).view(2, width) + 10 * rank
        return DraftTree.of_shape(chain(width - 1), tokens, torch.tensor([width, 1]))

    def on_rank(group: ThreadGroup) -> DraftTree:
        return share_tree(own_tree(group.rank), shape, group, CPU)

    first = own_tree(0)
    for tree in run_ranks(3, on_rank):
        assert tree.max_depth == first.max_depth
        for part in ("tokens", "parents", "depths", "sizes"):
            assert torch.equal(getattr(tree, part), getattr(first, part)), part
        seen = np.arange(4) < first.sizes.numpy()[:, None]
        assert (tree.ancestors.numpy()[seen] == first.ancestors.numpy()[seen]).all()
