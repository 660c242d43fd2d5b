"""A plan in the making, of which rows and drafts may be taken back."""

from __future__ import annotations

from engine.request import Sequence
from engine.scheduler.plan_builder import PlanBuilder
from engine.step.plan import UNKNOWN
from engine.step.shape import ROOT
from tests.support.engines.in_process import ask


def sequence(line: int, num_tokens: int, num_computed: int) -> Sequence:
    tokens = list(range(num_tokens))
    seq = Sequence(ask(f"{line}", tokens), tokens)
    seq.line, seq.num_computed = line, num_computed
    return seq


def test_a_row_that_is_taken_out_gives_back_its_tokens_and_nodes() -> None:
    plan = PlanBuilder(20, 2)
    first, second = sequence(0, 9, 8), sequence(1, 9, 8)
    plan.add(first, 1)
    plan.add_nodes(first, 4)
    before = plan.budget, plan.spare
    plan.add(second, 1)
    plan.add_nodes(second, 3)
    assert (plan.budget, plan.spare) == (20 - 5 - 4, 18 - 7)
    plan.remove(second)
    plan.remove(second)
    assert (plan.budget, plan.spare) == before
    assert [row.line for row in plan.build((), ROOT).rows] == [0]


def test_drafts_that_are_dropped_leave_neither_nodes_nor_tokens() -> None:
    plan = PlanBuilder(20, 1)
    seq = sequence(0, 9, 8)
    plan.add(seq, 1)
    plan.add_nodes(seq, 3, [7, 8, 9])
    assert plan.rows[0].build().draft == (7, 8, 9)
    plan.drop_drafts()
    (row,) = plan.build((), ROOT).rows
    assert (row.num_draft, row.draft) == (0, ())


def test_a_chunk_knows_the_token_that_follows_and_a_last_chunk_draws_it() -> None:
    plan = PlanBuilder(20, 0)
    plan.add(sequence(0, 9, 2), 3)
    plan.add(sequence(1, 9, 2), 7)
    chunk, last = plan.build((), ROOT).rows
    assert (chunk.token_ids, chunk.samples, chunk.next_token) == ((2, 3, 4), False, 5)
    assert (last.token_ids[-1], last.samples, last.next_token) == (8, True, UNKNOWN)


def test_blocks_are_told_once() -> None:
    seq = sequence(0, 9, 4)
    seq.block_ids = [11, 12]
    plan = PlanBuilder(20, 0)
    plan.add(seq, 2)
    (row,) = plan.build((), ROOT).rows
    assert (row.first_block, row.new_blocks) == (0, (11, 12))
    seq.block_ids.append(13)
    (row,) = plan.build((), ROOT).rows
    assert (row.first_block, row.new_blocks) == (2, (13,))
