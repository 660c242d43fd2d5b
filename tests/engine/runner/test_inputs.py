"""Compares forms and host inputs of a step with plain Python, row by row."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch

from engine.runner.forms import Sizes, StepForm, row_counts
from engine.runner.inputs import BLOCKS_PER_ROW, InputBuilder, StepInputs, TableChanges
from engine.sampling.lines import LineSettings
from engine.step.plan import UNKNOWN, Admission, RowPlan, StepPlan
from engine.step.shape import MAX_NODES, ROOT, DynamicShape, chain
from tests.support.engines.in_process import ask
from tests.support.engines.plans import decoding, random_admission, random_plan

VOCAB, BLOCK, MAX_LEN, NUM_LINES, SCRATCH = 50, 4, 70, 6, 999
EOS = frozenset({2, 41})
SIZES = ["exact", "padded"]
EXACT = pytest.mark.parametrize("exact", [True, False], ids=SIZES)


def builder_of(admissions: list[Admission], *, exact: bool) -> InputBuilder:
    settings = LineSettings(NUM_LINES, VOCAB, EOS)
    for admission in admissions:
        settings.admit(admission)
    return InputBuilder(Sizes(exact, NUM_LINES), settings, MAX_LEN, BLOCK, SCRATCH)


def random_step(seed: int, *, exact: bool) -> tuple[InputBuilder, StepPlan, random.Random]:
    rng = random.Random(seed)
    admissions = [random_admission(line, rng, VOCAB) for line in range(NUM_LINES)]
    plan = random_plan(rng, admissions, BLOCK, decodes=rng.random() < 0.5)
    return builder_of(admissions, exact=exact), plan, rng


def built(builder: InputBuilder, plan: StepPlan) -> tuple[StepForm, StepInputs]:
    form = builder.form(plan)
    changes, _ = builder.changes(plan.rows).split(builder.room(form))
    return form, builder.inputs(plan, form, changes)


def of_requests(*params: dict[str, Any], exact: bool, prompt: int = 9) -> InputBuilder:
    """One line per request, with these parameters."""
    ids = list(range(prompt))
    return builder_of(
        [Admission(line, ask(f"{line}", ids, **each)) for line, each in enumerate(params)],
        exact=exact,
    )


def named_of(builder: InputBuilder, rows: Sequence[RowPlan]) -> list[tuple[int, ...]]:
    """The tokens that each row wants to be scored."""
    params = [builder.settings.requests[row.line].params for row in rows]
    wanted = [row.samples and p.logprobs is not None for row, p in zip(rows, params, strict=True)]
    return [p.logprob_token_ids if yes else () for p, yes in zip(params, wanted, strict=True)]


# Rounding


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 16, 50, 64, 300])
def test_rows_are_padded_to_few_sizes_that_hold_them(max_num_seqs: int) -> None:
    counts = row_counts(max_num_seqs)
    assert list(counts) == sorted(set(counts))
    assert counts[-1] == max_num_seqs
    for count in range(1, max_num_seqs + 1):
        padded = Sizes(exact=False, max_num_seqs=max_num_seqs).rows(count)
        assert padded == min(n for n in counts if n >= count)
        assert Sizes(exact=True, max_num_seqs=max_num_seqs).rows(count) == count


def test_a_step_without_rows_has_a_size_too() -> None:
    assert Sizes(exact=False, max_num_seqs=8).rows(0) == 1


def test_tokens_are_padded_by_a_fifth_at_most_to_four_sizes_per_power_of_two() -> None:
    sizes = Sizes(exact=False, max_num_seqs=8)
    found = [sizes.tokens(count) for count in range(5000)]
    assert all(padded >= count for count, padded in enumerate(found))
    assert set(found[:17]) == {16}
    assert all(padded - count <= padded / 5 for count, padded in enumerate(found) if count > 16)
    for power in (16, 64, 1024):
        assert len({size for size in found if power < size <= 2 * power}) == 4
    assert [Sizes(exact=True, max_num_seqs=8).tokens(n) for n in range(40)] == list(range(40))


def test_lists_have_lengths_of_powers_of_two_and_none_stays_none() -> None:
    sizes = Sizes(exact=False, max_num_seqs=8)
    powers = [0, *(1 << n for n in range(3, 12))]
    for count in range(1500):
        assert sizes.entries(count) == min(size for size in powers if size >= count)
        assert Sizes(exact=True, max_num_seqs=8).entries(count) == count


# Forms


@EXACT
@pytest.mark.parametrize("seed", range(40))
def test_a_form_has_room_for_its_plan(seed: int, exact: bool) -> None:
    builder, plan, _ = random_step(seed, exact=exact)
    form, rows = builder.form(plan), plan.rows
    trees = [row for row in rows if row.is_drafted]
    lists = [
        sum(map(len, builder.settings.bias(row.line, row.start + len(row.token_ids))))
        for row in rows
        if row.samples
    ]
    drawing = [builder.settings.requests[row.line].params for row in rows if row.samples]
    asked = [builder.settings.requests[row.line].params for row in rows]
    needed = {
        "num_rows": len(rows),
        "num_own": sum(len(row.token_ids) for row in rows),
        "num_columns": max(row.num_blocks for row in rows),
        "num_known": max(len(row.draft) for row in rows),
        "num_bias": max(lists, default=0),
        "num_echo": sum(len(builder.echo(row)) for row in rows),
        "num_top": max((-1 if p.logprobs is None else p.logprobs for p in drawing), default=-1),
        "num_named": max(map(len, named_of(builder, rows))),
        "num_echo_top": max(-1 if p.prompt_logprobs is None else p.prompt_logprobs for p in asked),
    }
    for name, least in needed.items():
        if exact:
            assert getattr(form, name) == least, name
        else:
            assert getattr(form, name) >= least, name
            assert (getattr(form, name) > 0) == (least > 0) or name == "num_columns", name
    nodes = sum(1 + row.num_draft for row in rows)
    if not exact:
        assert form.num_columns == -(-(MAX_LEN + MAX_NODES) // BLOCK)
        assert form.num_nodes >= nodes
        assert form.num_tokens >= plan.num_tokens
    assert form.max_nodes >= max(1 + row.num_draft for row in rows)
    assert form.max_queries >= max(len(row.token_ids) + row.num_draft for row in rows) or exact
    assert form.only_roots == all(len(row.token_ids) == 1 for row in rows)
    assert (form.shape == ROOT) == (not trees or plan.shape.num_nodes == 1)
    if trees:
        most = max(1 + row.num_draft for row in trees)
        assert form.shape == (plan.shape.first(most) if exact else plan.shape)


@EXACT
@pytest.mark.parametrize("seed", range(40))
def test_a_form_has_the_parts_that_its_rows_ask_for(seed: int, exact: bool) -> None:
    builder, plan, _ = random_step(seed, exact=exact)
    form, settings = builder.form(plan), builder.settings
    drawing = [row.line for row in plan.rows if row.samples]
    temperatures = [float(settings.temperatures[line]) for line in drawing]
    assert form.exact == exact
    assert form.draws == bool(drawing)
    assert form.is_filtered == any(settings.is_filtered[line] for line in drawing)
    assert form.is_penalised == any(settings.is_penalised[line] for line in drawing)
    assert form.any_sampled == (not exact or any(t > 0 for t in temperatures))
    assert form.any_greedy == (not exact or any(t == 0 for t in temperatures))


@pytest.mark.parametrize("shape", [ROOT, chain(3), DynamicShape("dynamic", 9, 3, 4)])
@pytest.mark.parametrize(
    "params", [{}, {"top_k": 3, "temperature": 1.0}], ids=["plain", "filtered"]
)
@pytest.mark.parametrize("count", range(1, NUM_LINES + 1))
def test_usual_decode_steps_have_forms_that_were_foreseen(
    count: int, params: dict[str, Any], shape: Any
) -> None:
    """They are captured before the first request; a missed form costs a slow step later."""
    builder = of_requests(*[params] * NUM_LINES, exact=False)
    foreseen = list(builder.likely_forms([ROOT, shape]))
    rows = tuple(decoding(line, shape.num_nodes - 1) for line in range(count))
    assert builder.form(StepPlan(rows=rows, shape=shape)) in foreseen
    fewer = (*rows[:-1], decoding(count - 1, 0))
    assert builder.form(StepPlan(rows=fewer, shape=shape, ahead=True)) in foreseen
    sizes = [form.num_rows for form in foreseen]
    assert sizes == sorted(sizes, reverse=True)


# Inputs


@EXACT
@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_described_and_padding_rows_ask_for_nothing(seed: int, exact: bool) -> None:
    builder, plan, _ = random_step(seed, exact=exact)
    form, inputs = built(builder, plan)
    rows, missing = plan.rows, form.num_rows - len(plan.rows)
    ends = [min(row.num_blocks * BLOCK, MAX_LEN) for row in rows]
    expected = {
        "lines": ([row.line for row in rows], NUM_LINES),
        "follows": ([False] * len(rows), False),
        "starts": ([row.start for row in rows], 0),
        "lens": ([len(row.token_ids) for row in rows], 0),
        "samples": ([row.samples for row in rows], False),
        "next_tokens": ([row.next_token for row in rows], 0),
        "limits": ([1 + row.num_draft for row in rows], 0),
        "ends": (ends, 0),
        "num_known": ([len(row.draft) for row in rows], 0),
        "scored": ([bool(builder.settings.num_top[row.line] >= 0) for row in rows], False),
    }
    for name, (values, padding) in expected.items():
        assert getattr(inputs, name).tolist() == [*values, *[padding] * missing], name
    named = [list(ids) + [0] * (form.num_named - len(ids)) for ids in named_of(builder, rows)]
    if form.num_named:
        assert inputs.named_ids.tolist() == named + [[0] * form.num_named] * missing
    for name in ("seeds", "top_k", "temperatures", "top_p", "min_p", "repetition", "frequency",
                 "presence"):  # fmt: skip
        found, by_line = getattr(inputs, name), getattr(builder.settings, name)
        lines = [row.line for row in rows] + [NUM_LINES] * missing
        assert found.tolist() == [by_line[line] for line in lines], name


@EXACT
def test_no_position_beyond_the_context_has_a_slot(exact: bool) -> None:
    """Although the last block goes on."""
    builder = of_requests({}, exact=exact)
    blocks = tuple(range(-(-MAX_LEN // BLOCK)))
    row = RowPlan(
        line=0,
        start=MAX_LEN - 2,
        token_ids=(3,),
        first_block=0,
        new_blocks=blocks,
        samples=True,
    )
    assert len(blocks) * BLOCK > MAX_LEN
    _, inputs = built(builder, StepPlan(rows=(row,)))
    assert inputs.ends[0] == MAX_LEN


@EXACT
@pytest.mark.parametrize("seed", range(40))
def test_tokens_lie_row_after_row_and_known_drafts_side_by_side(seed: int, exact: bool) -> None:
    builder, plan, _ = random_step(seed, exact=exact)
    form, inputs = built(builder, plan)
    own = [token for row in plan.rows for token in row.token_ids]
    assert inputs.own_tokens.tolist() == own + [0] * (form.num_own - len(own))
    if form.num_known == 0:
        assert len(inputs.known) == 0
        return
    assert inputs.known.shape == (form.num_rows, form.num_known)
    for at in range(form.num_rows):
        draft = list(plan.rows[at].draft) if at < len(plan.rows) else []
        assert inputs.known[at].tolist() == draft + [0] * (form.num_known - len(draft))


@EXACT
def test_a_token_that_is_not_known_yet_is_left_to_the_step_before(exact: bool) -> None:
    builder = of_requests({}, {}, {}, exact=exact)
    rows = tuple(msgspec.structs.replace(decoding(line), token_ids=(UNKNOWN,)) for line in range(3))
    form, inputs = built(builder, StepPlan(rows=rows, ahead=True))
    assert form.follows
    assert form.num_rows == (3 if exact else 4)
    assert inputs.follows.tolist() == [True] * 3 + [False] * (form.num_rows - 3)
    assert set(inputs.own_tokens.tolist()) == {0}


@EXACT
@pytest.mark.parametrize("seed", range(40))
def test_each_row_has_the_bias_entries_of_its_line(seed: int, exact: bool) -> None:
    builder, plan, _ = random_step(seed, exact=exact)
    form, inputs = built(builder, plan)
    if form.num_bias == 0:
        assert len(inputs.bias_ids) == len(inputs.bias_values) == len(inputs.bias_until) == 0
        return
    assert inputs.bias_ids.shape == (form.num_rows, form.num_bias)
    for at in range(form.num_rows):
        entries = []
        if at < len(plan.rows) and plan.rows[at].samples:
            row = plan.rows[at]
            for part in builder.settings.bias(row.line, row.start + len(row.token_ids)):
                entries += zip(part.ids, part.values, part.until, strict=True)
        unused = [(-1, 0, 0)] * (form.num_bias - len(entries))
        found = zip(inputs.bias_ids[at].tolist(), inputs.bias_values[at].tolist(),
                    inputs.bias_until[at].tolist(), strict=True)  # fmt: skip
        assert list(found) == [*entries, *unused]


@pytest.mark.parametrize(("num_tokens", "num_bias"), [(9, 2), (10, 2), (11, 0), (12, 0)])
def test_what_holds_endings_back_depends_on_the_token_that_is_drawn(
    num_tokens: int, num_bias: int
) -> None:
    """It does not depend on where the last chunk of the prompt begins."""
    builder = of_requests({"min_tokens": 2}, exact=True, prompt=9)
    row = RowPlan(
        line=0,
        start=0,
        token_ids=(5,) * num_tokens,
        first_block=0,
        new_blocks=(1, 2, 3),
        samples=True,
    )
    assert builder.form(StepPlan(rows=(row,))).num_bias == num_bias


@EXACT
@pytest.mark.parametrize("seed", range(40))
def test_prompt_tokens_are_scored_by_the_token_before_them(seed: int, exact: bool) -> None:
    builder, plan, _ = random_step(seed, exact=exact)
    form, inputs = built(builder, plan)
    expected = []
    for at, row in enumerate(plan.rows):
        request = builder.settings.requests[row.line]
        if request.params.prompt_logprobs is None:
            continue
        for place in range(len(row.token_ids)):
            following = row.start + place + 1
            if following < len(request.prompt_ids):
                expected.append((at, place, request.prompt_ids[following]))
    found = list(zip(inputs.echo_rows.tolist(), inputs.echo_places.tolist(),
                     inputs.echo_tokens.tolist(), strict=True))  # fmt: skip
    assert found == expected + [(0, 0, 0)] * (form.num_echo - len(expected))


# Block tables


@EXACT
@pytest.mark.parametrize("seed", range(40))
def test_changes_of_block_tables_reach_them_within_the_step_or_before(
    seed: int, exact: bool
) -> None:
    builder, plan, rng = random_step(seed, exact=exact)
    columns = builder.num_columns
    tables = torch.tensor([[-1 - rng.randrange(9) for _ in range(columns)] for _ in range(7)])
    wanted = tables.clone()
    for row in plan.rows:
        wanted[row.line, row.first_block : row.num_blocks] = torch.tensor(row.new_blocks)
    form = builder.form(plan)
    room = builder.room(form)
    changes, early = builder.changes(plan.rows).split(room)
    if exact:
        assert early.places == early.blocks == []
    else:
        assert room is not None
        assert len(changes.places) <= room
    inputs = builder.inputs(plan, form, changes)
    assert len(inputs.table_places) == (len(changes.places) if exact else room)
    tables.view(-1)[early.places] = torch.tensor(early.blocks, dtype=tables.dtype)
    tables.view(-1)[inputs.table_places] = inputs.table_blocks.long()
    assert torch.equal(tables[:NUM_LINES], wanted[:NUM_LINES])
    padding = inputs.table_places[len(changes.places) :]
    assert set(padding.tolist()) <= {7 * columns - 1}  # the end of the padding line
    assert set(inputs.table_blocks[len(changes.places) :].tolist()) <= {SCRATCH}


def test_more_changes_than_a_padded_step_has_room_for_go_ahead_of_it() -> None:
    builder = of_requests({}, exact=False)
    row = RowPlan(
        line=0, start=0, token_ids=(3,), first_block=0, new_blocks=tuple(range(15)), samples=True
    )
    form = builder.form(StepPlan(rows=(row,)))
    assert builder.room(form) == BLOCKS_PER_ROW
    changes, early = builder.changes([row]).split(builder.room(form))
    assert (changes.blocks, early.blocks) == (list(range(8)), list(range(8, 15)))
    assert (changes.places, early.places) == (list(range(8)), list(range(8, 15)))


@pytest.mark.parametrize("room", [0, 1, 3, 4, 9, None])
def test_changes_are_split_after_as_many_as_there_is_room_for(room: int | None) -> None:
    here, others = TableChanges([1, 2, 3, 4], [5, 6, 7, 8]).split(room)
    count = 4 if room is None else min(room, 4)
    assert here == ([1, 2, 3, 4][:count], [5, 6, 7, 8][:count])
    assert others == ([1, 2, 3, 4][count:], [5, 6, 7, 8][count:])


@EXACT
@pytest.mark.parametrize("seed", range(4))
def test_every_input_is_contiguous_as_kernels_need_it(seed: int, exact: bool) -> None:
    builder, plan, _ = random_step(seed, exact=exact)
    _, inputs = built(builder, plan)
    assert [name for name, part in vars_of(inputs).items() if not part.is_contiguous()] == []


def vars_of(inputs: StepInputs) -> dict[str, torch.Tensor]:
    return {part.name: getattr(inputs, part.name) for part in dataclasses.fields(inputs)}


@EXACT
def test_a_line_that_changes_hands_has_its_new_settings_in_the_next_step(exact: bool) -> None:
    """What was read of the lines is kept from step to step."""
    builder = of_requests({"temperature": 0.0}, {"temperature": 0.5, "seed": 7}, exact=exact)
    plan = StepPlan(rows=(decoding(0), decoding(1)))
    first, again = built(builder, plan), built(builder, plan)
    assert first[0] == again[0]
    assert torch.equal(first[1].temperatures, again[1].temperatures)
    builder.settings.release(0)
    builder.settings.admit(Admission(0, ask("new", [1], temperature=0.9, top_k=3, seed=8)))
    form, inputs = built(builder, plan)
    assert inputs.temperatures[:2].tolist() == pytest.approx([0.9, 0.5])
    assert inputs.seeds[:2].tolist() == [8, 7]
    assert form.is_filtered
    assert not first[0].is_filtered
