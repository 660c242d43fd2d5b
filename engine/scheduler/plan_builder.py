"""Builds a step plan row by row. A row is removed again if its sequence is preempted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from engine.messages import DraftState
from engine.request import Sequence
from engine.scheduler.pacing import PromptTime
from engine.step.plan import UNKNOWN, Admission, RowPlan, StepPlan
from engine.step.shape import TreeShape


@dataclass(slots=True)
class RowBuilder:
    """Builds a row. Its blocks are read last, after all slots are reserved."""

    seq: Sequence
    num_tokens: int
    num_draft: int = 0  # draft nodes that have budget
    found: tuple[int, ...] = ()  # their tokens, if they are a chain from the lookup

    def build(self) -> RowPlan:
        seq = self.seq
        start, end = seq.num_computed, seq.num_computed + self.num_tokens
        samples = end == len(seq.token_ids)
        return row_plan(
            seq,
            start,
            tuple(seq.token_ids[start:end]),
            samples=samples,
            num_draft=self.num_draft,
            draft=self.found,
            next_token=UNKNOWN if samples else seq.token_ids[end],
        )


class PlanBuilder:
    """The rows planned so far, and the budget that is left."""

    def __init__(self, budget: int, num_decoding: int, time: PromptTime | None = None) -> None:
        """`time`: limits the prompt tokens besides the budget; None: only the budget does."""
        self.budget = budget
        self._time = time
        self.spare = budget - num_decoding  # for draft nodes, after one token for every root
        self.rows: dict[int, RowBuilder] = {}  # by line
        self.admitted: dict[int, Admission] = {}
        self.num_admitted_blocks = 0
        self.preempted_any = False  # because blocks have run out

    @property
    def takes_prompts(self) -> bool:
        """Whether the budget and the time allow more prompt tokens."""
        return self.budget > 0 and (self._time is None or self._time.is_left)

    def chunk(self, wanted: int, context: int) -> int:
        """How many of the `wanted` prompt tokens after `context` others a row gets. The time that
        they take is spent."""
        return wanted if self._time is None else self._time.spend(wanted, context)

    def admit(self, seq: Sequence, num_tokens: int, state: DraftState | None = None) -> None:
        """Add a row of a sequence that starts or starts over in this step. `state`: what a draft
        head may know of it, if it comes from another engine."""
        output_ids = tuple(seq.token_ids[seq.num_prompt :])
        request = seq.request
        if request.prediction:  # only the scheduler needs it
            request = msgspec.structs.replace(request, prediction=[])
        self.admitted[seq.line] = Admission(seq.line, request, output_ids, state)
        self.num_admitted_blocks += len(seq.block_ids)
        self.add(seq, num_tokens)

    def add(self, seq: Sequence, num_tokens: int) -> None:
        self.rows[seq.line] = RowBuilder(seq, num_tokens)
        self.budget -= num_tokens

    def add_nodes(self, seq: Sequence, num_draft: int, found: Iterable[int] = ()) -> None:
        """Spend budget on draft nodes of a row. `found`: their tokens, if known."""
        row = self.rows[seq.line]
        row.num_draft, row.found = num_draft, tuple(found)
        self.budget -= num_draft
        self.spare -= num_draft

    def drop_drafts(self) -> None:
        """Blocks have run out: no row drafts in this step."""
        for row in self.rows.values():
            row.num_draft, row.found = 0, ()

    def remove(self, seq: Sequence) -> None:
        self.admitted.pop(seq.line, None)
        row = self.rows.pop(seq.line, None)
        if row is not None:
            self.budget += row.num_tokens + row.num_draft
            self.spare += row.num_draft

    def build(self, released: Iterable[int], shape: TreeShape) -> StepPlan:
        """The plan, after all slots are reserved."""
        return StepPlan(
            rows=tuple(row.build() for row in self.rows.values()),
            admitted=tuple(a for line, a in self.admitted.items() if line in self.rows),
            released=tuple(released),
            shape=shape,
        )


def row_plan(
    seq: Sequence,
    start: int,
    token_ids: tuple[int, ...],
    *,
    samples: bool,
    num_draft: int,
    draft: tuple[int, ...] = (),
    next_token: int = UNKNOWN,
) -> RowPlan:
    """A row of a plan that will be launched: from now on, the executor counts as knowing all of the
    sequence's blocks."""
    first, seq.num_planned_blocks = seq.num_planned_blocks, len(seq.block_ids)
    return RowPlan(
        line=seq.line,
        start=start,
        token_ids=token_ids,
        first_block=first,
        new_blocks=tuple(seq.block_ids[first:]),
        samples=samples,
        num_draft=num_draft,
        draft=draft,
        next_token=next_token,
    )
