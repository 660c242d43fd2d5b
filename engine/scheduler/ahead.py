"""Plans the decode step that follows one still in flight, with places for tokens not yet known.

Where the tokens of the step in flight end is unknown, so slots are reserved for the most that it
may emit and all that may hang below the last of them. What does not fit is not planned: the outcome
is waited for, and `Scheduler.schedule` has all its ways to make room.

Rows may end when the step in flight is taken in, and their blocks are free from then on, although
this step still writes to them. That harms nobody:

- A row writes to its own blocks only, from the position after the last token that the step in
  flight emitted. Every block that can be found by its content (`KVManager.publish`) lies in front
  of that position, also where the end of the text cut off what was emitted. So no cached content
  changes, whoever takes it up again.
- Any other block is written by its next owner before that owner reads it, in a later step, and the
  device takes steps in order.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from collections.abc import Sequence as Rows
from itertools import compress

import msgspec

from engine.request import Sequence
from engine.scheduler.drafts import Awaited, DraftRoom
from engine.scheduler.planning import row_plan
from engine.step.plan import UNKNOWN, StepOutcome, StepPlan
from engine.step.shape import TreeShape

Continuing = list[tuple[Sequence, Awaited]]


def plan_ahead(
    before: StepPlan,
    running: Rows[Sequence],
    drafts: DraftRoom,
    budget: int,
    choose: Callable[[int], TreeShape],
) -> StepPlan | None:
    """The step that follows `before`, for those of its rows that may continue; None if there are
    none, or no slots for them. All of `running` draw a token in `before`.

    Args:
        budget: tokens of one step.
        choose: the shape, for a number of rows that could draft.
    """
    continuing = _continuing(before, running, drafts.max_len)
    if not continuing:
        return None
    shape = choose(sum(drafts.most_nodes(seq, awaited) > 0 for seq, awaited in continuing))
    spare = budget - len(continuing)
    nodes = []
    for seq, awaited in continuing:
        nodes.append(drafts.room(seq, shape, spare, awaited))
        spare -= nodes[-1]
    if not _reserve(continuing, nodes, drafts, shape):
        return None
    rows = tuple(
        row_plan(
            seq,
            len(seq.token_ids) - 1 + awaited.least,
            (UNKNOWN,),
            samples=True,
            num_draft=count,
        )
        for (seq, awaited), count in zip(continuing, nodes, strict=True)
    )
    return StepPlan(rows=rows, shape=shape, ahead=True)


def only(
    plan: StepPlan, outcome: StepOutcome, running: Container[int]
) -> tuple[StepPlan, StepOutcome]:
    """Those rows whose lines are still `running`."""
    kept = [row.line in running for row in plan.rows]
    if all(kept):
        return plan, outcome
    rows, outcomes = tuple(compress(plan.rows, kept)), tuple(compress(outcome.rows, kept))
    replace = msgspec.structs.replace
    return replace(plan, rows=rows), replace(outcome, rows=outcomes)


def _continuing(before: StepPlan, running: Rows[Sequence], max_len: int) -> Continuing:
    """Rows that do not end with the very next token."""
    known = {row.line: row for row in before.rows}
    found = []
    for seq in running:
        row = known[seq.line]
        last = seq.num_output + 1 >= seq.request.params.max_tokens
        if last or len(seq.token_ids) + 1 >= max_len:
            continue
        depth = len(row.draft) if row.draft else min(row.num_draft, before.shape.max_depth)
        found.append((seq, Awaited(1, 1 + depth)))
    return found


def _reserve(continuing: Continuing, nodes: Rows[int], drafts: DraftRoom, shape: TreeShape) -> bool:
    """Slots for all rows, or for none."""
    kv = drafts.kv
    wanted = [
        drafts.slots(seq, shape.slots_for(1 + count) if count else 1, awaited)
        for (seq, awaited), count in zip(continuing, nodes, strict=True)
    ]
    new = [
        max(0, kv.blocks_for(slots) - len(seq.block_ids))
        for (seq, _), slots in zip(continuing, wanted, strict=True)
    ]
    if sum(new) > kv.num_free:
        return False
    for (seq, _), slots in zip(continuing, wanted, strict=True):
        found = kv.reserve(seq, slots)
        assert found, "there were blocks for all"
    return True
