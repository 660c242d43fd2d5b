"""A step plan while it is being made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from engine.request import Sequence
from engine.step.plan import Admission, RowPlan


class PlanDraft:
    """A plan in the making: rows can be taken out again when their sequence is preempted."""

    def __init__(self, budget: int, num_decoding: int) -> None:
        self.budget = budget
        self.num_decoding = num_decoding
        self.spare = budget - num_decoding  # for draft nodes: every root has its token first
        self.rows: dict[str, RowPlan] = {}
        self.num_draft: dict[str, int] = {}  # nodes with a share of the budget, without slots yet
        self.found: dict[str, tuple[int, ...]] = {}  # of them, chains found in the text
        self.admitted: dict[str, Admission] = {}
        self.preempted_any = False

    def add(self, seq: Sequence, num_tokens: int) -> None:
        start, end = seq.num_computed, seq.num_computed + num_tokens
        samples = end == len(seq.token_ids)
        self.rows[seq.request_id] = RowPlan(
            request_id=seq.request_id,
            start=start,
            token_ids=seq.token_ids[start:end],
            block_ids=seq.block_ids,
            samples=samples,
            next_token=None if samples else seq.token_ids[end],
        )
        self.budget -= num_tokens

    def set_aside(self, request_id: str, num_draft: int, found: Iterable[int] = ()) -> None:
        """Spend budget on draft nodes of a row, whose tokens are `found` if they are known."""
        self.num_draft[request_id] = num_draft
        self.found[request_id] = tuple(found)
        self.budget -= num_draft
        self.spare -= num_draft

    def grow(self, request_id: str) -> None:
        """Let the row have the nodes that were set aside for it."""
        row = self.rows[request_id]
        num_draft, found = self.num_draft[request_id], self.found[request_id]
        self.rows[request_id] = replace(row, num_draft=num_draft, draft=found)

    def take_out(self, request_id: str) -> None:
        row = self.rows.pop(request_id, None)
        if row is not None:
            num_draft = self.num_draft.pop(request_id, 0)
            self.budget += len(row.token_ids) + num_draft
            self.spare += num_draft
