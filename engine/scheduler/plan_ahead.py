"""Plans the decode step behind one that is still in flight, with places for tokens not yet known.

Where the tokens of the step in flight end is unknown, so slots are reserved for the most that it
may emit and all that may hang below the last of them. What does not fit is not planned: the outcome
is waited for, and `Scheduler.schedule` has all its ways to make room.

Rows may end when the step in flight is taken in, and their blocks are free from then on, although
this step still writes to them. That harms nobody:

- A row writes to its own blocks only, from the position behind the last token that the step in
  flight emitted. Every block that can be found by its content (`KVManager.publish`) lies in front
  of that position, also where the end of the text cut off what was emitted. So no cached content
  changes, whoever takes it up again.
- Any other block is written by its next owner before he reads it, in a later step, and the device
  takes steps in order.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from collections.abc import Sequence as Rows
from dataclasses import replace
from itertools import compress

from engine.request import Sequence
from engine.scheduler.draft_room import Awaited, DraftRoom
from engine.step.plan import UNKNOWN, RowPlan, StepOutcome, StepPlan
from engine.step.shape import DynamicShape, TreeShape

GoingOn = list[tuple[Sequence, Awaited]]


def plan_ahead(
    before: StepPlan,
    running: Rows[Sequence],
    drafts: DraftRoom,
    budget: int,
    choose: Callable[[int], TreeShape],
) -> StepPlan | None:
    """The step behind `before` for those of its rows that may go on; None if there are none, or no
    slots for them. All of `running` are at their root, and in `before`.

    Args:
        budget: tokens of one step.
        choose: the shape, for a number of rows that could draft.
    """
    going_on = _going_on(before, running, drafts.max_len)
    if not going_on:
        return None
    shape = choose(sum(drafts.most_nodes(seq, awaited) > 0 for seq, awaited in going_on))
    spare = budget - len(going_on)
    nodes = []
    for seq, awaited in going_on:
        nodes.append(drafts.room(seq, shape, spare, awaited))
        spare -= nodes[-1]
    cut = any(0 < count < shape.num_nodes - 1 for count in nodes)
    if isinstance(shape, DynamicShape) and cut:
        return None  # such rows go through the host
    if not _reserve(going_on, nodes, drafts, shape):
        return None
    rows = [_row(*part, count) for part, count in zip(going_on, nodes, strict=True)]
    return StepPlan(tuple(rows), shape=shape, ahead=True)


def only(
    plan: StepPlan, outcome: StepOutcome, alive: Container[str]
) -> tuple[StepPlan, StepOutcome]:
    """Those rows whose requests are `alive`."""
    kept = [row.request_id in alive for row in plan.rows]
    if all(kept):
        return plan, outcome
    rows, outcomes = tuple(compress(plan.rows, kept)), tuple(compress(outcome.rows, kept))
    return replace(plan, rows=rows), replace(outcome, rows=outcomes)


def _going_on(before: StepPlan, running: Rows[Sequence], max_len: int) -> GoingOn:
    """Rows that do not end with the very next token."""
    known = {row.request_id: row for row in before.rows}
    found = []
    for seq in running:
        row = known[seq.request_id]
        last = seq.num_output + 1 >= seq.request.params.max_tokens
        if last or len(seq.token_ids) + 1 >= max_len:
            continue
        deepest = min(row.num_draft, before.shape.max_depth)
        found.append((seq, Awaited(1, 1 + deepest)))
    return found


def _reserve(going_on: GoingOn, nodes: Rows[int], drafts: DraftRoom, shape: TreeShape) -> bool:
    """Slots for all rows, or for none."""
    kv = drafts.kv
    wanted = [
        drafts.slots(seq, shape.slots_for(1 + count) if count else 1, awaited)
        for (seq, awaited), count in zip(going_on, nodes, strict=True)
    ]
    new = [
        max(0, kv.blocks_for(slots) - len(seq.block_ids))
        for (seq, _), slots in zip(going_on, wanted, strict=True)
    ]
    if sum(new) > kv.num_free:
        return False
    for (seq, _), slots in zip(going_on, wanted, strict=True):
        found = kv.reserve(seq, slots)
        assert found, "there were blocks for all"
    return True


def _row(seq: Sequence, awaited: Awaited, num_draft: int) -> RowPlan:
    return RowPlan(
        request_id=seq.request_id,
        start=seq.num_computed + awaited.least,
        token_ids=[UNKNOWN],
        block_ids=seq.block_ids,
        samples=True,
        num_draft=num_draft,
    )
