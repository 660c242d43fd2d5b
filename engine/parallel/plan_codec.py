"""Step plans as bytes: requests by number, and of block tables only what is new.

Encoder and decoder start empty and see the same plans, so both know what was said before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from engine.parallel.frames import (
    AdmissionFrame,
    DynamicFrame,
    PlanFrame,
    RowFrame,
    StaticFrame,
)
from engine.step.plan import Admission, RowPlan, StepPlan
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape


@dataclass(slots=True)
class SentRow:
    """A running row as the followers know it."""

    line: int
    num_blocks: int = 0


class PlanEncoder:
    """Rank 0's side, for one runner."""

    def __init__(self, block_size: int, *, scratch: bool = False) -> None:
        self._block_size = block_size
        self._scratch = scratch
        self._rows: dict[str, SentRow] = {}
        self._free: list[int] = []
        self._shape: TreeShape = ROOT
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, plan: StepPlan) -> bytes:
        released = [self._rows.pop(name).line for name in plan.released]
        self._free += released
        admitted = [self._admit(admission) for admission in plan.admitted]
        frame = PlanFrame(
            self._scratch,
            [self._row(row) for row in plan.rows],
            admitted,
            released,
            None if plan.shape == self._shape else _shape_frame(plan.shape),
        )
        self._shape = plan.shape
        return self._encoder.encode(frame)

    def _admit(self, admission: Admission) -> AdmissionFrame:
        line = self._free.pop() if self._free else len(self._rows)
        self._rows[admission.request.request_id] = SentRow(line)
        return AdmissionFrame(line, admission.request, admission.output_ids)

    def _row(self, row: RowPlan) -> RowFrame:
        sent = self._rows[row.request_id]
        # Blocks behind the computed tokens may have been replaced since the last plan.
        first = min(sent.num_blocks, row.start // self._block_size)
        sent.num_blocks = len(row.block_ids)
        return RowFrame(
            sent.line,
            row.start,
            row.token_ids,
            first,
            row.block_ids[first:],
            row.samples,
            row.num_draft,
            row.draft,
            row.next_token,
        )


@dataclass(slots=True)
class KnownRow:
    """A running row on a follower."""

    request_id: str
    block_ids: list[int] = field(default_factory=list)


class PlanDecoder:
    """A follower's side, for one runner."""

    def __init__(self) -> None:
        self._rows: dict[int, KnownRow] = {}
        self._shape: TreeShape = ROOT

    def decode(self, frame: PlanFrame) -> StepPlan:
        released = tuple(self._rows.pop(line).request_id for line in frame.released)
        for entry in frame.admitted:
            self._rows[entry.line] = KnownRow(entry.request.request_id)
        if frame.shape is not None:
            self._shape = _shape_of(frame.shape)
        return StepPlan(
            tuple(self._row(row) for row in frame.rows),
            tuple(Admission(entry.request, entry.output_ids) for entry in frame.admitted),
            released,
            self._shape,
        )

    def _row(self, row: RowFrame) -> RowPlan:
        known = self._rows[row.line]
        known.block_ids = known.block_ids[: row.first_block] + row.block_ids
        return RowPlan(
            known.request_id,
            row.start,
            row.token_ids,
            known.block_ids,
            row.samples,
            row.num_draft,
            row.draft,
            row.next_token,
        )


def _shape_frame(shape: TreeShape) -> StaticFrame | DynamicFrame:
    if isinstance(shape, StaticShape):
        return StaticFrame(shape.name, shape.parents)
    return DynamicFrame(shape.name, shape.num_nodes, shape.max_depth, shape.top_k)


def _shape_of(frame: StaticFrame | DynamicFrame) -> TreeShape:
    if isinstance(frame, StaticFrame):
        return StaticShape(frame.name, frame.parents)
    return DynamicShape(frame.name, frame.num_nodes, frame.max_depth, frame.top_k)
