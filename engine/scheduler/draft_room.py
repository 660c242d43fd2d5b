"""What draft nodes get of a step: budget and slots that nobody else wants."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

from engine.kv.manager import KVManager
from engine.request import Sequence
from engine.scheduler.plan_draft import PlanDraft
from engine.speculation.lookup import Lookup
from engine.step.shape import TreeShape


@dataclass(frozen=True, slots=True)
class Awaited:
    """How many tokens a step in flight will add to a sequence."""

    least: int = 0
    most: int = 0


NOTHING = Awaited()


@dataclass(frozen=True, slots=True)
class DraftRoom:
    """Shares room out among the rows of a plan, and finds drafts in their own text."""

    kv: KVManager
    max_len: int  # positions of one sequence
    lookahead: int  # slots that the proposer needs behind a row's last token
    lookup: Lookup | None  # None: the proposer alone drafts

    def slots(self, seq: Sequence, num_tokens: int, awaited: Awaited = NOTHING) -> int:
        """Slots a sequence needs for its next `num_tokens` tokens and nodes behind `awaited`."""
        end = seq.num_computed + awaited.most + num_tokens
        return min(end + self.lookahead, self.max_len)

    def most_nodes(self, seq: Sequence, awaited: Awaited = NOTHING) -> int:
        """How many the request and the context length allow, whatever the shape."""
        if seq.request.params.max_tokens - seq.num_output - awaited.least <= 1:
            return 0  # the bonus token is all that is missing
        # The bonus token needs a place too.
        room = max(0, self.max_len - len(seq.token_ids) - awaited.most - 1)
        limit = seq.request.max_draft_nodes
        return room if limit is None else min(room, limit)

    def set_aside(self, plan: PlanDraft, running: Rows[Sequence], shape: TreeShape) -> None:
        """Share what budget there is for draft nodes among the rows planned so far."""
        for seq in running:
            if seq.request_id in plan.rows:
                room = self.room(seq, shape, plan.spare)
                found = self._found(plan, seq, has_rival=room > 0)
                plan.set_aside(seq.request_id, len(found) or room, found)

    def grow(self, plan: PlanDraft, running: Rows[Sequence], shape: TreeShape) -> None:
        """Reserve slots for draft nodes once everybody else has theirs: they preempt nobody and
        keep nobody out."""
        for seq in running:
            num_draft = plan.num_draft.get(seq.request_id, 0)
            if num_draft == 0:
                continue
            nodes = 1 + num_draft
            own = nodes if plan.found[seq.request_id] else shape.slots_for(nodes)
            if self.kv.reserve(seq, self.slots(seq, own)):
                plan.grow(seq.request_id)

    def room(self, seq: Sequence, shape: TreeShape, spare: int, awaited: Awaited = NOTHING) -> int:
        """How many nodes of `shape` may hang below this sequence's root in a step that has budget
        for `spare`."""
        num_draft = max(0, min(shape.num_nodes - 1, spare, self.most_nodes(seq, awaited)))
        room = self.max_len - len(seq.token_ids) - awaited.most
        return num_draft if shape.slots_for(1 + num_draft) - 1 <= room else 0

    def _found(self, plan: PlanDraft, seq: Sequence, *, has_rival: bool) -> list[int]:
        """A chain from the sequence's own text; never longer than what may still be emitted."""
        if self.lookup is None:
            return []
        wanted = seq.request.params.max_tokens - seq.num_output - 1
        most = min(wanted, plan.spare, self.most_nodes(seq))
        return self.lookup.draft(seq, most, plan.num_decoding, has_rival=has_rival)
