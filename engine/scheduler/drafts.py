"""Gives draft nodes the budget and slots of a step that nothing else needs, and counts how many
were accepted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.kv.manager import KVManager
from engine.messages import DraftSource, Round
from engine.request import Sequence
from engine.scheduler.plan_builder import PlanBuilder
from engine.speculation.lookup import HOPELESS, Found, Lookup
from engine.speculation.lookup import NOTHING as NO_DRAFT
from engine.speculation.planner import Candidate, Choice
from engine.step.plan import RowOutcome, RowPlan
from engine.step.shape import MAX_NODES, ROOT, TreeShape

if TYPE_CHECKING:
    from engine.grammar.grammars import Grammars


@dataclass(frozen=True, slots=True)
class Awaited:
    """How many tokens a step in flight will add to a sequence."""

    least: int = 0
    most: int = 0


NOTHING = Awaited()


@dataclass(frozen=True, slots=True)
class DraftRoom:
    """Shares room for draft nodes among the rows of a plan, and looks up drafts in their text."""

    kv: KVManager
    max_len: int  # positions of one sequence
    lookahead: int  # slots that the proposer needs after a row's last token
    lookup: Lookup | None  # None: only the proposer drafts
    grammars: Grammars | None = None

    def slots(self, seq: Sequence, num_tokens: int, awaited: Awaited = NOTHING) -> int:
        """Slots a sequence needs for its next `num_tokens` tokens and nodes, after those that a
        step in flight adds."""
        first = len(seq.token_ids) - 1 if awaited.most else seq.num_computed
        end = first + awaited.most + num_tokens
        return min(end + self.lookahead, self.max_len)

    def most_nodes(self, seq: Sequence, awaited: Awaited = NOTHING) -> int:
        """How many nodes the request and the context length allow, whatever the shape."""
        if seq.request.params.max_tokens - seq.num_output - awaited.least <= 1:
            return 0  # only the bonus token is missing
        # The bonus token needs a position too.
        room = max(0, self.max_len - len(seq.token_ids) - awaited.most - 1)
        limit = seq.request.max_draft_nodes
        return room if limit is None else min(room, limit)

    def candidate(self, seq: Sequence, awaited: Awaited = NOTHING) -> Candidate:
        """A decoding row as the planner sees it."""
        sampled = seq.request.params.temperature > 0
        most = self.most_nodes(seq, awaited)
        least = min(most, seq.request.min_draft_nodes)
        return Candidate(seq.line, sampled, seq.num_computed, most, least)

    def share_budget(self, plan: PlanBuilder, running: Rows[Sequence], choice: Choice) -> None:
        """Share the budget for draft nodes among the rows planned so far."""
        rows = [seq for seq in running if seq.line in plan.rows]
        found = self._all_found(plan, rows, choice)
        if not found and choice.shape == ROOT:
            return
        for seq in rows:
            tokens = found.get(seq.line, ())[: plan.spare]
            plan.add_nodes(seq, len(tokens) or self.room(seq, choice, plan.spare), tokens)

    def reserve_slots(self, plan: PlanBuilder, running: Rows[Sequence], shape: TreeShape) -> None:
        """Reserve slots for draft nodes after all other rows have theirs, so that draft nodes never
        preempt a sequence or delay an admission. A row without slots drafts nothing."""
        for seq in running:
            row = plan.rows.get(seq.line)
            if row is None or row.num_draft == 0:
                continue
            nodes = 1 + row.num_draft
            own = nodes if row.found else shape.slots_for(nodes)
            if not self.kv.reserve(seq, self.slots(seq, own)):
                row.num_draft, row.found = 0, ()

    def room(self, seq: Sequence, choice: Choice, spare: int, awaited: Awaited = NOTHING) -> int:
        """How many of the chosen nodes this sequence's root may get in a step with budget for
        `spare`."""
        shape = choice.shape
        num_draft = max(0, min(choice.limit(seq.line), spare, self.most_nodes(seq, awaited)))
        room = self.max_len - len(seq.token_ids) - awaited.most
        return num_draft if shape.slots_for(1 + num_draft) - 1 <= room else 0

    def round_of(self, row: RowPlan, result: RowOutcome) -> Round | None:
        """How a row's tokens came, from its outcome; None if its request has no trace."""
        if result.nodes is None:
            return None
        source = self._source(row) if result.num_draft else None
        return Round(source, result.nodes, result.path)

    def _source(self, row: RowPlan) -> DraftSource:
        if not row.draft:
            return DraftSource.HEAD
        looked_up = self.lookup is not None and self.lookup.drafts(row.line)
        return DraftSource.LOOKUP if looked_up else DraftSource.GRAMMAR

    def _all_found(
        self, plan: PlanBuilder, rows: Rows[Sequence], choice: Choice
    ) -> dict[int, tuple[int, ...]]:
        """Known drafts by line; none if all of them together promise less than the extra cost of a
        step with drafts."""
        none_looked_up = self.lookup is None or not choice.looks_up or choice.price >= HOPELESS
        if none_looked_up and (self.grammars is None or not self.grammars.any_runs):
            return {}
        found = {seq.line: self._found(plan, seq, choice) for seq in rows}
        if sum(each.promise for each in found.values()) <= choice.entry:
            return {}
        return {line: each.tokens for line, each in found.items() if each.tokens}

    def _found(self, plan: PlanBuilder, seq: Sequence, choice: Choice) -> Found:
        """A chain no longer than the remaining output: what its grammar forces, or what followed
        earlier in the sequence's own text."""
        rival = 0.0
        if choice.promises and self.room(seq, choice, plan.spare) > 0:
            rival = choice.promise(seq.line)
        wanted = seq.request.params.max_tokens - seq.num_output - 1
        most = min(wanted, plan.spare, self.most_nodes(seq))
        forced = self._forced(seq, min(most, MAX_NODES - 1))
        promise = len(forced) * (1 - choice.price)  # they are accepted for certain
        if forced and promise > rival:
            if self.lookup is not None:
                self.lookup.withdraw(seq.line)
            return Found(tuple(forced), promise)
        if self.lookup is None or not choice.looks_up:
            return NO_DRAFT
        return self.lookup.draft(seq, most, choice.price, rival, may_try=choice.may_try)

    def _forced(self, seq: Sequence, most: int) -> list[int]:
        matcher = None if self.grammars is None else self.grammars.of_line(seq.line)
        is_decoding = seq.num_computed == len(seq.token_ids) - 1
        return matcher.forced(most) if matcher is not None and is_decoding else []


def count_draft(seq: Sequence, num_draft: int, num_accepted: int, predicted: bool) -> None:
    """Count a tree of a sequence; `predicted`: it is from the request's prediction."""
    if num_draft == 0:
        return
    seq.num_drafts += 1
    seq.num_drafted += num_draft
    seq.most_drafted = max(seq.most_drafted, num_draft)
    seq.num_accepted += num_accepted
    if predicted:
        seq.num_predicted += num_draft
        seq.num_predicted_accepted += num_accepted
    seq.accepted_counts += [0] * (num_accepted + 1 - len(seq.accepted_counts))
    seq.accepted_counts[num_accepted] += 1


@dataclass(slots=True)
class DraftCounts:
    """Counts draft nodes and accepted tokens since start."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    steps_by_tree: Counter[str] = field(default_factory=Counter)
    seconds_by_part: dict[str, float] = field(default_factory=dict)
    num_faults: int = 0  # as the runner counts them
    failed: bool = False

    def stats(self) -> dict[str, Any]:
        """Fields of `EngineStats`."""
        return {
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "accepted_per_position": tuple(self.accepted_per_position),
            "steps_by_tree": dict(self.steps_by_tree),
            "seconds_by_part": dict(self.seconds_by_part),
            "num_draft_faults": self.num_faults,
            "draft_failed": self.failed,
        }

    def add_step(self, tree: str, seconds: Mapping[str, float]) -> None:
        """Count a step that verified trees of this shape, and the time of its parts."""
        self.steps_by_tree[tree] += 1
        for part, spent in seconds.items():
            self.seconds_by_part[part] = self.seconds_by_part.get(part, 0.0) + spent

    def add_tree(self, num_draft: int, num_accepted: int) -> None:
        """Count a tree with `num_draft` nodes besides the root, `num_accepted` of them accepted."""
        if num_draft == 0:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_draft
        self.num_accepted_tokens += num_accepted
        missing = num_accepted - len(self.accepted_per_position)
        self.accepted_per_position += [0] * missing
        for depth in range(num_accepted):
            self.accepted_per_position[depth] += 1
