"""Plans the decode step that follows one still in flight, with placeholders for unknown tokens.

It is unknown how many tokens the step in flight emits, so slots are reserved for the most that it
may emit and for the tree below the last of them. If they do not fit, no step is planned: the engine
waits for the outcome, and `Scheduler.schedule` can make room by preemption.

Rows may end when the step in flight is collected. Their blocks are free from then on, although this
step still writes to them. That is safe:

- A row writes only to its own blocks, from the position after the last token that the step in
  flight emitted. Every published block (`KVManager.publish`) lies before that position, even if the
  end of the text cut off emitted tokens. So no cached content changes.
- The next owner of any other block writes it before reading it, in a later step, and the device
  runs steps in order.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from collections.abc import Sequence as Rows
from itertools import compress

import msgspec

from engine.request import Sequence
from engine.scheduler.drafts import Awaited, DraftRoom
from engine.scheduler.plan_builder import row_plan
from engine.speculation.planner import Candidate, Choice
from engine.step.plan import UNKNOWN, StepOutcome, StepPlan
from engine.step.shape import TreeShape

Continuing = list[tuple[Sequence, Awaited]]


def plan_ahead(
    before: StepPlan,
    running: Rows[Sequence],
    drafts: DraftRoom,
    budget: int,
    choose: Callable[[Rows[Candidate]], Choice],
) -> StepPlan | None:
    """The step that follows `before`, for those of its rows that may continue; None if there are
    none, or too few slots. Every sequence of `running` must draw a token in `before`.

    Args:
        budget: tokens of one step.
        choose: gives the trees for the rows of a step.
    """
    continuing = _continuing(before, running, drafts.max_len)
    if not continuing:
        return None
    choice = choose([drafts.candidate(seq, awaited) for seq, awaited in continuing])
    spare = budget - len(continuing)
    nodes = []
    for seq, awaited in continuing:
        nodes.append(drafts.room(seq, choice, spare, awaited))
        spare -= nodes[-1]
    if not _reserve(continuing, nodes, drafts, choice.shape):
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
    return StepPlan(rows=rows, shape=choice.shape, ahead=True)


def keep_lines(
    plan: StepPlan, outcome: StepOutcome, running: Container[int]
) -> tuple[StepPlan, StepOutcome]:
    """The rows whose lines are still `running`."""
    kept = [row.line in running for row in plan.rows]
    if all(kept):
        return plan, outcome
    rows, outcomes = tuple(compress(plan.rows, kept)), tuple(compress(outcome.rows, kept))
    replace = msgspec.structs.replace
    return replace(plan, rows=rows), replace(outcome, rows=outcomes)


def _continuing(before: StepPlan, running: Rows[Sequence], max_len: int) -> Continuing:
    """Sequences that do not end with the next token, and how many tokens each will get."""
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
    """Reserve slots for all rows; False, and no reservation, if there are too few blocks."""
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
