"""Where drafted nodes go, what they see, and with which noise their children are ranked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafter.growing import Grower, grow
from drafter.heads.interface import DraftBatch
from drafter.static_levels import StaticLevels
from engine.kv.scratch import Scratch
from engine.speculation.proposer import DraftLimits, Roots
from engine.step.shape import StaticShape, ancestors_of, chain
from kernels.ops import Ops
from kernels.sampling.rank.ranking import NodeDraws
from kernels.sampling.settings import DrawSettings

VOCAB, BLOCK, SCRATCH, MAX_LEN = 23, 4, 90, 30
TREE = StaticShape("tree", (-1, 0, 0, 1, 1, 3))


@dataclass
class NotingHead:
    """Ranks tokens anyhow, the same behind every state; notes what is run through it."""

    scores: Tensor  # [V]
    batches: list[DraftBatch] = field(default_factory=list)
    target_ids: Tensor | None = None

    def logits(self, states: Tensor, ctx: Any) -> Tensor:
        return self.scores.expand(len(states), -1)

    def forward(self, features: Tensor, batch: DraftBatch, ctx: Any) -> Tensor:
        self.batches.append(batch)
        return features


def grower_of(
    ops: Ops,
    positions: list[int],
    num_slots: list[int],
    *,
    temperature: float = 0.0,
    filtered: bool = False,
) -> tuple[Grower, NotingHead]:
    """Rows whose blocks are numbered 10 * row, 10 * row + 1, ..."""
    count = len(positions)
    head = NotingHead(torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)))
    roots = Roots(
        lines=torch.arange(count),
        tokens=torch.arange(count) + 5,
        positions=torch.tensor(positions),
        max_nodes=torch.tensor(num_slots),
        block_tables=(torch.arange(count)[:, None] * 10 + torch.arange(9)).int(),
        temperatures=torch.full((count,), temperature),
        seeds=torch.arange(count) + 77,
        top_k=torch.full((count,), 9),
        top_p=torch.full((count,), 0.9),
        min_p=torch.full((count,), 0.01),
    )
    ctx: Any = SimpleNamespace(ops=ops, kv=SimpleNamespace(block_size=BLOCK))
    limits = DraftLimits(False, temperature > 0, filtered, 36, MAX_LEN)
    first_keys = torch.ones(count, dtype=torch.int32)
    grower = Grower(
        head,  # type: ignore[arg-type]
        ctx,
        roots,
        torch.tensor(num_slots),
        first_keys,
        roots.max_nodes,
        limits,
        Scratch(SCRATCH, BLOCK),
        StaticLevels(torch.device("cpu")),
    )
    return grower, head


@pytest.mark.parametrize("shape", [chain(5), TREE], ids=lambda shape: shape.name)
def test_nodes_have_the_slots_after_their_root_or_scratch(
    shape: StaticShape, reference_ops: Ops
) -> None:
    """A node without a slot sees the root alone, for others cannot be found."""
    positions, num_slots = [6, 9, 3], [6, 3, 1]
    grower, head = grower_of(reference_ops, positions, num_slots)
    grow(shape, grower, torch.zeros(3, 8))
    masks = ancestors_of(shape.parents)
    inner = sorted({parent for parent in shape.parents if parent > 0})
    seen: dict[tuple[int, int], tuple[int, int, int]] = {}
    numbers = iter([[n for n in inner if shape.depths[n] == depth] for depth in range(1, 6)])
    for batch in head.batches:
        nodes = next(numbers)
        width = len(nodes)
        assert batch.attention.cu_q.tolist() == [0, width, 2 * width, 3 * width]
        assert batch.attention.prefix_lens.tolist() == positions
        for place, (slot, position, mask) in enumerate(
            zip(
                batch.slots.tolist(),
                batch.positions.tolist(),
                batch.attention.ancestors.tolist(),
                strict=True,
            )
        ):
            seen[place // width, nodes[place % width]] = (slot, position, mask)
    assert len(seen) == 3 * len(inner)
    for (row, node), (slot, position, mask) in seen.items():
        at = positions[row] + node
        assert position == positions[row] + shape.depths[node]
        if node < num_slots[row]:
            assert slot == (10 * row + at // BLOCK) * BLOCK + at % BLOCK, (row, node)
            assert mask == masks[node], (row, node)
        else:
            assert slot // BLOCK == SCRATCH, (row, node)
            assert mask == 1, (row, node)


def test_no_node_lies_beyond_the_last_position_of_a_sequence(reference_ops: Ops) -> None:
    """Rotary tables end there."""
    grower, head = grower_of(reference_ops, [MAX_LEN - 3, 7], [2, 6])
    grow(chain(5), grower, torch.zeros(2, 8))
    assert [batch.positions.tolist() for batch in head.batches] == [
        [min(MAX_LEN - 3 + depth, MAX_LEN - 1), 7 + depth] for depth in range(1, 5)
    ]


@pytest.mark.parametrize(("temperature", "filtered"), [(0.0, False), (0.9, False), (1.7, True)])
def test_a_head_that_knows_the_target_drafts_the_very_tokens_that_will_be_drawn(
    reference_ops: Ops, temperature: float, filtered: bool
) -> None:
    """At every depth with the noise of its position, and the filters of the request."""
    positions = [6, 9, 3]
    grower, head = grower_of(
        reference_ops, positions, [6, 6, 6], temperature=temperature, filtered=filtered
    )
    tree = grow(chain(5), grower, torch.zeros(3, 8))
    filters = ("top_k", "top_p", "min_p") if filtered else ()
    for depth in range(1, 6):
        drawn = reference_ops.draw(
            head.scores.repeat(3, 1),
            DrawSettings(
                temperature=torch.full((3,), temperature),
                seeds=grower.roots.seeds,
                positions=torch.tensor(positions) + depth,
                **{name: getattr(grower.roots, name) for name in filters},
                any_sampled=temperature > 0,
                any_greedy=temperature == 0,
            ),
        )
        assert tree.tokens[:, depth].tolist() == drawn.tolist()


def test_a_draft_may_be_any_token_of_the_vocabulary(reference_ops: Ops) -> None:
    """With flat logits most draws lie outside any short list of likely tokens."""
    flat = torch.linspace(1, 0, 900).expand(40, -1).contiguous()
    settings = DrawSettings(torch.full((40,), 1.3), torch.arange(40), torch.arange(40) + 9)
    drawn = reference_ops.draw(flat, settings)
    draws = NodeDraws(replace(settings, positions=settings.positions - 1), 1, 1)
    for scored in (False, True):
        ranked = reference_ops.rank_drafts(flat, draws, None, 1, scored)
        assert ranked.tokens[:, 0].tolist() == drawn.tolist()
    assert (drawn > 64).float().mean() > 0.8


def test_a_proposer_keeps_the_tensors_of_every_shape_it_has_grown() -> None:
    """Captured steps hold their addresses."""
    levels = StaticLevels(torch.device("cpu"))
    shapes = [StaticShape(f"{n}", tuple(range(-1, n))) for n in range(1, 60)]

    def addresses() -> list[int]:
        found = [levels.of(shape).masks for shape in shapes]
        found += [levels.of(shape).inner.nodes for shape in shapes]
        found += [levels.starts(rows, 2) for rows in range(1, 60)]
        return [tensor.data_ptr() for tensor in found]

    assert addresses() == addresses()
