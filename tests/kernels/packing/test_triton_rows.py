"""A step's start and end, each in one launch, equal what torch does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.copies import join
from engine.kv.scratch import Scratch
from engine.kv.storage import KVStorage
from engine.runner.layout import Layout
from engine.runner.line_state import LineState
from engine.speculation.verify import commit, walk
from kernels.ops import Ops
from kernels.packing.settling import DrawnTrees
from kernels.registry import reference_ops
from tests.engine.runner.test_layout import BLOCK, NUM_LINES, SCRATCH, VOCAB, Case, case_of
from tests.kernels import triton_env

packing = triton_env.load("kernels.packing.triton_kernel")
rows = triton_env.load("kernels.packing.triton_rows")
settling = triton_env.load("kernels.packing.triton_settle")
pytestmark = [
    *triton_env.MARKS,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not triton_env.INTERPRETED, reason="cases lie in host memory"),
]
CPU, COLUMNS = torch.device("cpu"), 300  # more than are copied at a time


def cases(count: int) -> Iterator[tuple[random.Random, Case]]:
    for seed in range(count):
        case = case_of(seed, exact=False, decodes=True)
        if case.form.only_roots:
            yield random.Random(seed), case


def random_state(seed: int, columns: int) -> LineState:
    state = LineState.allocate(NUM_LINES, columns, VOCAB, Scratch(SCRATCH, BLOCK), CPU)
    source = torch.Generator().manual_seed(seed)
    for part, most in ((state.tokens, VOCAB), (state.positions, 40), (state.tables[:-1], 1000)):
        part.copy_(torch.randint(most, part.shape, generator=source))
    return state


def copied(state: LineState) -> LineState:
    return replace(
        state,
        tables=state.tables.clone(),
        tokens=state.tokens.clone(),
        positions=state.positions.clone(),
    )


def changes(rng: random.Random, lines: list[int]) -> tuple[Tensor, Tensor]:
    """New blocks of these lines, and as padding the last place of the last line."""
    some = sorted(rng.sample(range(COLUMNS), 90))
    places = [line * COLUMNS + column for line in lines for column in some]
    blocks = [rng.randrange(10**6) for _ in places]
    last = (NUM_LINES + 1) * COLUMNS - 1
    return torch.tensor([*places, last, last]), torch.tensor([*blocks, SCRATCH, SCRATCH]).int()


def test_started_rows_are_those_of_torch() -> None:
    num_following = 0
    for rng, case in cases(6):
        plan, inputs = case.rows, case.layout.inputs
        follows = torch.tensor([rng.random() < 0.5 for _ in inputs.lines]) & (inputs.limits > 0)
        places, blocks = changes(rng, [row.line for row in plan])
        inputs = replace(inputs, follows=follows, table_places=places, table_blocks=blocks)
        expected = random_state(len(plan), COLUMNS)
        state = copied(expected)
        expected.tables.view(-1).index_put_((places,), blocks)
        followed = expected.follow(inputs)
        got, started = state.start(inputs, rows.start_rows)
        assert torch.equal(state.tables, expected.tables)
        assert torch.equal(started.tables, expected.tables[inputs.lines])
        assert torch.equal(got.own_tokens, followed.own_tokens)
        assert torch.equal(got.starts, followed.starts)
        assert torch.equal(started.positions, (got.starts + got.lens - 1).clamp(min=0))
        is_known = inputs.num_known > 0
        limits = torch.where(is_known, inputs.limits.clamp(max=1), inputs.limits)
        assert torch.equal(started.max_nodes, limits)
        num_following += int(follows.sum())
    assert num_following > 2


def test_settled_trees_are_those_of_torch() -> None:
    num_moved = num_accepted = 0
    for rng, case in cases(8):
        layout = with_packed(case)
        assert layout.packed is not None
        inputs, tree = layout.inputs, layout.tree
        drawn = often_right(rng, layout)
        faults = torch.tensor([rng.random() < 0.3 for _ in inputs.lines])
        expected = random_state(len(case.rows), 20)
        state = copied(expected)
        result = walk(tree, layout.unpack_nodes(drawn), reference_ops(CPU, torch.float32))
        expected.keep(inputs.lines, inputs.starts + inputs.lens - 1, result)
        settled = settling.settle(
            DrawnTrees(
                tokens=tree.tokens,
                parents=tree.parents,
                sizes=tree.sizes,
                faults=faults,
                drawn=drawn,
                at=layout.packed.at,
                inside=layout.packed.inside,
                slots=layout.packed.slots,
                lines=inputs.lines,
                starts=inputs.starts,
                lens=inputs.lens,
                line_tokens=state.tokens,
                line_positions=state.positions,
                max_depth=tree.max_depth,
                first_scratch=layout.scratch.first_slot,
            )
        )
        for name in ("path", "num_accepted", "emitted"):
            assert torch.equal(getattr(settled, name), getattr(result, name)), name
        assert torch.equal(state.tokens[:-1], expected.tokens[:-1])
        assert torch.equal(state.positions[:-1], expected.positions[:-1])
        ours, theirs = (settled.sources, settled.targets), moves(layout, result)
        for got, other in zip(ours, theirs, strict=True):
            assert torch.equal(got, other)
        report = settled.reported()
        wanted = (result.emitted, result.path, tree.sizes, tree.tokens, tree.parents, faults)
        for name, got, other in zip(report._fields, report, wanted, strict=True):
            assert torch.equal(got, other), name
        assert join(list(report)).data_ptr() == settled.report.data_ptr()
        num_moved += int((settled.sources != settled.targets).sum())
        num_accepted += int(result.num_accepted.sum())
    assert num_moved > 0
    assert num_accepted > 5


def with_packed(case: Case) -> Layout:
    usual = case.layout
    parts = (usual.inputs, usual.tree, usual.form, usual.tables, usual.scratch, usual.max_len)
    return Layout.of(*parts, packing.pack_nodes)


def often_right(rng: random.Random, layout: Layout) -> Tensor:
    """Tokens drawn at the packed nodes, mostly that of a child; some are unsound."""
    packed, tree = layout.packed, layout.tree
    assert packed is not None
    drawn = torch.full((len(packed.tokens),), -1)
    for row, node in packed.inside.nonzero().tolist():
        children = tree.tokens[row][tree.parents[row] == node].tolist()
        right = children and rng.random() < 0.8
        drawn[packed.at[row, node]] = rng.choice(children) if right else rng.randrange(-1, VOCAB)
    return drawn


def moves(layout: Layout, result: object) -> tuple[Tensor, Tensor]:
    """Sources and targets of the KV that torch moves."""
    found: list[Tensor] = []

    def kv_move(pages: object, sources: Tensor, targets: Tensor) -> None:
        found.extend((sources, targets))

    assert layout.packed is not None
    slots = layout.unpack_nodes(layout.packed.slots, layout.scratch.first_slot)
    path, depth = result.path, layout.tree.max_depth  # type: ignore[attr-defined]
    nothing = torch.empty(0, dtype=torch.int64)
    if depth == 0:
        return nothing, nothing
    ops: Ops = replace(reference_ops(CPU, torch.float32), kv_move=kv_move)
    commit(result, slots, KVStorage((), ()), ops)  # type: ignore[arg-type]
    if found:
        return found[0], found[1]
    roots = slots[:, :1].expand(-1, path.shape[1] - 1).flatten()
    return roots, roots  # on a CPU it leaves the call out if nothing moves
