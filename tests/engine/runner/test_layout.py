"""Compares the layout of the packed tokens of a step with loops over the plan."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from engine.kv.scratch import Scratch
from engine.runner.forms import Sizes, StepForm
from engine.runner.inputs import InputBuilder, TableChanges
from engine.runner.layout import Layout, Packing
from engine.sampling.lines import LineSettings
from engine.step.plan import Admission, RowPlan, StepPlan
from engine.step.shape import ancestors_of, chain, depths_of, signed
from engine.step.tree import DraftTree, VerifyResult
from tests.support.drafts.scripted_proposer import random_parents, tree_of
from tests.support.engines.in_process import ask
from tests.support.engines.plans import random_admission, random_plan

VOCAB, BLOCK, MAX_LEN, NUM_LINES, SCRATCH = 50, 4, 48, 6, 9999
EXACT = pytest.mark.parametrize("exact", [True, False], ids=["exact", "padded"])
KINDS = pytest.mark.parametrize("decodes", [True, False], ids=["roots", "mixed"])
SEEDS = pytest.mark.parametrize("seed", range(25))

# Packing


@pytest.mark.parametrize(
    "counts", [[3], [0], [2, 0, 3], [0, 0, 4, 1], [1, 1, 1], [5, 0, 0], [0, 0, 0], [2, 2]]
)
@pytest.mark.parametrize("spare", [None, 0, 1, 6])
def test_parts_lie_one_after_the_other(counts: list[int], spare: int | None) -> None:
    total = sum(counts)
    packing = Packing.of(torch.tensor(counts), None if spare is None else total + spare)
    places = [(part, place) for part, count in enumerate(counts) for place in range(count)]
    assert packing.cu.tolist() == [sum(counts[:part]) for part in range(len(counts) + 1)]
    assert len(packing.row_of) == total + (spare or 0)
    found = zip(packing.row_of.tolist(), packing.place.tolist(), strict=True)
    assert list(found)[:total] == places
    assert all(0 <= part < len(counts) for part in packing.row_of.tolist())
    if spare is None:
        assert packing.used is None
    else:
        assert packing.used is not None
        assert packing.used.tolist() == [True] * total + [False] * spare


@pytest.mark.parametrize("spare", [None, 0, 3])
def test_values_are_kept_in_parts_and_spread_to_rows(spare: int | None) -> None:
    packing = Packing.of(torch.tensor([2, 0, 3]), None if spare is None else 5 + spare)
    values = torch.arange(10, 10 + len(packing.row_of))
    assert packing.mask_padding(values, -7).tolist() == [10, 11, 12, 13, 14, *[-7] * (spare or 0)]
    spread = packing.unpack(values, 4, -1).tolist()
    assert spread == [[10, 11, -1, -1], [-1] * 4, [12, 13, 14, -1]]


# Layouts


@dataclass
class Case:
    """A random step: rows, their trees and their block tables."""

    rows: tuple[RowPlan, ...]
    form: StepForm
    layout: Layout
    trees: list[tuple[list[int], list[int]]]  # parents and tokens, by row of the plan
    tables: list[list[int]]  # blocks, by row of the plan
    firsts: list[int] = field(default_factory=list)  # index of each row's first token among all

    @property
    def num_tokens(self) -> int:
        return sum(map(self.length, range(len(self.rows))))

    def length(self, at: int) -> int:
        return len(self.rows[at].token_ids) + len(self.trees[at][0]) - 1

    def slot(self, at: int, position: int) -> int:
        return self.tables[at][position // BLOCK] * BLOCK + position % BLOCK


def case_of(seed: int, *, exact: bool, decodes: bool) -> Case:
    rng = random.Random(seed)
    admissions: list[Admission] = [random_admission(n, rng, VOCAB) for n in range(NUM_LINES)]
    settings = LineSettings(NUM_LINES, VOCAB, frozenset())
    for admission in admissions:
        settings.admit(admission)
    builder = InputBuilder(Sizes(exact, NUM_LINES), settings, MAX_LEN, BLOCK, SCRATCH)
    plan = random_plan(rng, admissions, BLOCK, decodes=decodes)
    form = builder.form(plan)
    trees = [random_tree(rng, row, form) for row in plan.rows]
    case = Case(plan.rows, form, layout_of(builder, plan, form, trees), trees, tables_of(plan))
    case.firsts = [sum(map(case.length, range(at))) for at in range(len(plan.rows))]
    return case


def random_tree(rng: random.Random, row: RowPlan, form: StepForm) -> tuple[list[int], list[int]]:
    size = rng.choice([1, 1 + row.num_draft, rng.randint(1, 1 + row.num_draft)])
    parents = random_parents(size, rng, max(1, form.max_depth))
    return parents, [row.token_ids[-1], *rng.choices(range(VOCAB), k=size - 1)]


def tables_of(plan: StepPlan) -> list[list[int]]:
    return [[1000 * row.line + column for column in range(row.num_blocks)] for row in plan.rows]


def layout_of(
    builder: InputBuilder,
    plan: StepPlan,
    form: StepForm,
    trees: list[tuple[list[int], list[int]]],
) -> Layout:
    missing = form.num_rows - len(plan.rows)
    tree = tree_of([*trees, *[([-1], [0])] * missing])
    if not form.exact:
        tree = wider(tree, form.max_nodes, form.max_depth)
    columns = form.num_columns
    tables = [blocks + [SCRATCH] * (columns - len(blocks)) for blocks in tables_of(plan)]
    tables += [[SCRATCH] * columns] * missing
    return Layout.of(
        builder.inputs(plan, form, TableChanges([], [])),
        tree,
        form,
        torch.tensor(tables, dtype=torch.int32),
        Scratch(SCRATCH, BLOCK),
        MAX_LEN,
    )


def wider(tree: DraftTree, width: int, depth: int) -> DraftTree:
    """The tree with more columns and arbitrary values in unused nodes."""
    inside = torch.arange(width) < tree.sizes[:, None]

    def wide(part: Tensor, unused: int) -> Tensor:
        part = torch.nn.functional.pad(part, (0, width - part.shape[1]))
        return torch.where(inside, part, unused)

    return DraftTree(
        wide(tree.tokens, 33),
        wide(tree.parents, -1),
        wide(tree.depths, 3),
        wide(tree.ancestors, 7),
        tree.sizes,
        max(depth, tree.max_depth),
    )


@SEEDS
@KINDS
@EXACT
def test_the_target_gets_own_tokens_and_then_the_nodes_of_every_row(
    seed: int, decodes: bool, exact: bool
) -> None:
    case = case_of(seed, exact=exact, decodes=decodes)
    batch, total = case.layout.batch(), case.num_tokens
    tokens, positions, slots, masks = [], [], [], []
    for at, row in enumerate(case.rows):
        parents, nodes = case.trees[at]
        depths, own = depths_of(parents), len(row.token_ids)
        root = row.start + own - 1
        tokens += [*row.token_ids[:-1], *nodes]
        positions += [*range(row.start, root), *(root + depth for depth in depths)]
        slots += [case.slot(at, row.start + place) for place in range(case.length(at))]
        seen = [signed(mask) for mask in ancestors_of(parents)] if len(parents) > 1 else [0]
        masks += [*[0] * (own - 1), *seen]
    assert batch.token_ids[:total].tolist() == tokens
    assert batch.positions[:total].tolist() == positions
    assert batch.slots[:total].tolist() == slots
    attention = batch.attention
    assert attention.ancestors[:total].tolist() == masks
    ends = [0] * (case.form.num_rows - len(case.rows))
    lengths = [*map(case.length, range(len(case.rows))), *ends]
    assert attention.cu_q.diff().tolist() == lengths
    assert attention.prefix_lens.tolist() == [*(row.start for row in case.rows), *ends]
    assert attention.first_keys.tolist() == [0] * len(lengths)
    longest = max(lengths)
    reach = max(row.start + case.length(at) for at, row in enumerate(case.rows))
    if exact:
        assert len(batch.token_ids) == total
        assert (attention.max_q, attention.max_context) == (longest, reach)
    else:
        assert len(batch.token_ids) == case.form.num_tokens >= total
        assert attention.max_q >= longest
        assert attention.max_context >= reach
    assert_padding(batch.token_ids[total:], batch.slots[total:], attention.ancestors[total:])
    assert batch.positions.min() >= 0
    assert batch.positions.max() < MAX_LEN


def assert_padding(tokens: Tensor, slots: Tensor, masks: Tensor) -> None:
    """Padding goes to the scratch block, and no two neighbours to the same slot."""
    assert set(tokens.tolist()) <= {0}
    assert set(masks.tolist()) <= {0}
    assert all(SCRATCH * BLOCK <= slot < (SCRATCH + 1) * BLOCK for slot in slots.tolist())
    assert all(a != b for a, b in zip(slots.tolist(), slots.tolist()[1:], strict=False))


@SEEDS
@KINDS
@EXACT
def test_every_node_is_found_among_the_tokens(seed: int, decodes: bool, exact: bool) -> None:
    case = case_of(seed, exact=exact, decodes=decodes)
    layout, rows = case.layout, range(len(case.rows))
    roots = [case.firsts[at] + len(case.rows[at].token_ids) - 1 for at in rows]
    nodes = [(at, node) for at in rows for node in range(len(case.trees[at][0]))]
    count, width = len(nodes), layout.tree.tokens.shape[1]
    numbers = torch.arange(len(layout.batch().token_ids)) + 100
    assert layout.pick_nodes(numbers)[:count].tolist() == [
        100 + roots[at] + node for at, node in nodes
    ]
    assert set(layout.pick_nodes(numbers)[count:].tolist()) <= {0}
    marks = torch.arange(case.form.num_rows * width).view(case.form.num_rows, width)
    assert layout.flatten_nodes(marks)[:count].tolist() == [at * width + node for at, node in nodes]
    assert layout.repeat_rows(marks[:, 0])[:count].tolist() == [at * width for at, _ in nodes]
    assert len(layout.nodes.row_of) == (count if exact else case.form.num_nodes)
    spread = layout.unpack_nodes(torch.arange(len(layout.nodes.row_of)), -5)
    wanted = torch.full((case.form.num_rows, width), -5)
    for number, (at, node) in enumerate(nodes):
        wanted[at, node] = number
    assert torch.equal(spread, wanted)


def random_result(rng: random.Random, case: Case) -> VerifyResult:
    """A path in every tree, and tokens emitted along it. A row that does not sample emits its next
    prompt token."""
    width = case.layout.tree.max_depth + 1
    paths, emitted = [], []
    for at, row in enumerate(case.rows):
        parents = case.trees[at][0]
        node, path = rng.randrange(len(parents)) if row.samples else 0, []
        while node >= 0:
            path.insert(0, node)
            node = parents[node]
        paths.append(path)
        drawn = rng.choices(range(VOCAB), k=len(path))
        emitted.append(drawn if row.samples else [row.next_token])
    missing = case.form.num_rows - len(case.rows)
    paths, emitted = [*paths, *[[0]] * missing], [*emitted, *[[0]] * missing]

    def spread(rows: list[list[int]]) -> Tensor:
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows])

    accepted = torch.tensor([len(path) - 1 for path in paths])
    return VerifyResult(spread(paths), accepted, spread(emitted))


@SEEDS
@KINDS
@EXACT
def test_committed_are_all_tokens_that_follow_a_computed_one_and_have_a_slot(
    seed: int, decodes: bool, exact: bool
) -> None:
    case = case_of(seed, exact=exact, decodes=decodes)
    result = random_result(random.Random(seed), case)
    committed = case.layout.committed(result)
    entries: list[tuple[int, int, int, int]] = []  # token, position, slot, feature
    counts = []
    for at, row in enumerate(case.rows):
        end = min(row.num_blocks * BLOCK, MAX_LEN)
        root = len(row.token_ids) - 1
        following = [(token, place) for place, token in enumerate(row.token_ids[1:])]
        for depth in range(int(result.num_accepted[at]) + 1):
            following.append((int(result.emitted[at, depth]), root + int(result.path[at, depth])))
        before = len(entries)
        for place, (token, feature) in enumerate(following):
            position = row.start + place + 1
            if position < end:
                slot = case.slot(at, position)
                entries.append((token, position, slot, case.firsts[at] + feature))
        counts.append(len(entries) - before)
    counts += [0] * (case.form.num_rows - len(case.rows))
    total = len(entries)
    found = zip(
        committed.tokens.tolist(),
        committed.positions.tolist(),
        committed.slots.tolist(),
        committed.features.tolist(),
        strict=True,
    )
    assert list(found)[:total] == entries
    assert committed.cu.diff().tolist() == counts
    assert committed.lines.tolist() == case.layout.inputs.lines.tolist()
    assert committed.block_tables is case.layout.tables
    assert committed.exact == exact
    last = max((position for _, position, _, _ in entries), default=0)
    assert committed.max_context > last
    if exact:
        assert len(committed.tokens) == total
        assert committed.max_entries == max(counts)
    else:
        assert committed.max_entries >= max(counts)
    padding = slice(total, None)
    zeros = torch.zeros_like(committed.tokens[padding])
    assert_padding(committed.tokens[padding], committed.slots[padding], zeros)
    assert set(committed.features[padding].tolist()) <= {0}
    assert set(committed.positions[padding].tolist()) <= {0}


def test_a_padded_step_has_room_for_all_that_long_paths_commit() -> None:
    """Few own tokens, a chunk among them, and many more that are accepted."""
    depth = 20
    settings = LineSettings(NUM_LINES, VOCAB, frozenset())
    for line in range(4):
        settings.admit(Admission(line, ask(f"{line}", [5] * 9, max_tokens=30)))
    builder = InputBuilder(Sizes(False, NUM_LINES), settings, MAX_LEN, BLOCK, SCRATCH)
    chunk = RowPlan(
        line=3,
        start=0,
        token_ids=(5, 5),
        first_block=0,
        new_blocks=(3000,),
        samples=False,
        next_token=5,
    )
    blocks = range(-(-(9 + depth + 1) // BLOCK))
    rows = tuple(
        RowPlan(
            line=line,
            start=8,
            token_ids=(5,),
            first_block=0,
            new_blocks=tuple(1000 * line + column for column in blocks),
            samples=True,
            num_draft=depth,
        )
        for line in range(3)
    )
    plan = StepPlan(rows=(*rows, chunk), shape=chain(depth))
    form = builder.form(plan)
    trees = [([*range(-1, depth)], [5] * (depth + 1))] * 3 + [([-1], [5])]
    layout = layout_of(builder, plan, form, trees)
    case = Case(plan.rows, form, layout, trees, tables_of(plan))
    path = torch.arange(depth + 1).repeat(form.num_rows, 1)
    accepted = torch.tensor([depth] * 3 + [0] * (form.num_rows - 3))
    committed = layout.committed(VerifyResult(path, accepted, path + 7))
    assert committed.cu.diff().tolist()[:4] == [depth + 1] * 3 + [2]
    assert len(committed.tokens) >= 3 * (depth + 1) + 2
    assert committed.max_entries >= depth + 1
    wanted = [case.slot(at, 9 + place) for at in range(3) for place in range(depth + 1)]
    assert committed.slots[: len(wanted)].tolist() == wanted


def test_rows_that_reach_the_end_of_their_slots_are_among_the_cases() -> None:
    """Otherwise the test above would miss them."""
    cut = 0
    for seed in range(25):
        case = case_of(seed, exact=True, decodes=True)
        result = random_result(random.Random(seed), case)
        wanted = sum(len(row.token_ids) for row in case.rows) + int(result.num_accepted.sum())
        cut += wanted - len(case.layout.committed(result).tokens)
    assert cut > 0
