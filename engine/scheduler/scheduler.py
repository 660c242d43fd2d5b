"""Continuous batching with one rule: let `num_computed` of every sequence catch up with its length.

Each step spends a budget of tokens in this order: decoding sequences (so that a long prompt never
stops decoding), then running prompts, then new admissions; but a waiting sequence comes before
running prompts of a larger priority. Among the running, the order is by rank: priority, then turn.
Choice i of a request has its turn with the request that comes i requests later, so that many
choices do not hold up others. `WaitingQueue` says who starts next, and engine/scheduler/
preempting.py who gives way when blocks are missing, or lines for a more important one.

A step costs the host a bounded time per running row and nothing per waiting one: only the next one
is looked up in the prefix cache, its blocks are hashed once, and if blocks are missing it is not
looked up again before some came free.

Draft nodes get the budget that the roots leave, or half of it while prompts are to be computed, and
blocks that nothing else needs in this step.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

from engine.kv.manager import KVManager
from engine.messages import (
    EngineStats,
    ErrorCode,
    Finished,
    Handover,
    Reserved,
    Resume,
    Tokens,
)
from engine.request import FinishReason, Rank, Request, Sequence, Status
from engine.scheduler.ahead import keep_lines, plan_ahead
from engine.scheduler.answers import Answers
from engine.scheduler.cutting import TextEnds
from engine.scheduler.drafts import DraftCounts, DraftRoom, count_draft
from engine.scheduler.ending import End, finished_event
from engine.scheduler.handovers import Handovers, Pages
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.pacing import PromptTime, StepTimes
from engine.scheduler.plan_builder import PlanBuilder
from engine.scheduler.preempting import choose_outranked, choose_victim
from engine.scheduler.refusing import why_impossible
from engine.scheduler.waiting import WaitingQueue
from engine.speculation.lookup import Lookup, tree_name
from engine.speculation.planner import Candidate, Choice
from engine.step.plan import RowOutcome, RowPlan, StepOutcome, StepPlan

if TYPE_CHECKING:
    from engine.grammar.grammars import Grammars

ADMITTED_BLOCKS = 4096  # no more sequences start in a step whose new ones got as many blocks
HASHED_BLOCKS = 1024  # of a waiting sequence that a step hashes while others run
OUTPUT_WEIGHT = 2  # work of an output token, in prompt tokens, when clients are compared
PLAIN = Choice()
Event = Tokens | Finished | Reserved


class Scheduler:
    """Owns every `Sequence`. Requests and outcomes in; plans and events out. No torch."""

    def __init__(
        self,
        limits: SchedulerLimits,
        kv: KVManager,
        eos_token_ids: frozenset[int],
        *,
        vocab_size: int,
        clock: Callable[[], float] = time.time,
        on_finish: Callable[[Sequence, FinishReason], None] | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """`on_finish` is called with every sequence that ends. `grammars`: those of requests, which
        are open before they are submitted; None: no request has one."""
        self._limits = limits
        self._kv = kv
        self._vocab_size = vocab_size
        self._clock = clock
        self._max_len = min(limits.max_model_len, kv.capacity)
        self._drafts = DraftRoom(kv, self._max_len, 0, None, grammars)
        self._live: dict[str, Sequence] = {}
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # most important first
        self._free_lines = list(range(limits.max_num_seqs - 1, -1, -1))
        self._by_line: dict[int, Sequence] = {}
        self._released: list[int] = []  # lines given back since the last plan
        # From outside a step: aborts, rejections; and reservations
        self._events: list[Event] = []
        self._leaving: list[Pages] = []  # of sequences that left in this step
        self._answers = Answers(kv, TextEnds(eos_token_ids, self._max_len, grammars), clock)
        self.handovers = Handovers(kv.block_size)
        self._counts = DraftCounts()
        self._times = StepTimes()
        self._on_finish = on_finish
        self._grammars = grammars
        # Waits for blocks. Nothing it needs can have come free until this is None again.
        self._blocked: Sequence | None = None
        self._num_requests = self._num_submitted = 0
        self._num_preemptions = self._num_steps = self._last_tokens = 0
        self._num_looked_back = 0  # cached tokens that were computed again

    def submit(
        self,
        *requests: Request,
        problem: tuple[str, ErrorCode] | None = None,
        output_ids: Rows[int] = (),
        reserve: bool = False,
        handover: Handover | None = None,
    ) -> None:
        """Queue the requests for one prompt, which have one list of prompt ids. Requests that can
        never run get their `Finished` at once, as do those with a `problem`. `output_ids`,
        `reserve` and `handover`: see `Submit`.

        Raises:
            ValueError: an id belongs to a live request.
        """
        new: set[str] = set()
        for request in requests:
            if request.request_id in self._live or request.request_id in new:
                raise ValueError(f"request_id {request.request_id!r} is in use by a live request")
            new.add(request.request_id)
        problem = problem or why_impossible(requests[0], self._max_len, self._vocab_size)
        prompt_hashes: list[bytes] = []
        for request in requests:
            seq = Sequence.from_request(request)
            seq.rank, seq.prompt_hashes = self._next_rank(request), prompt_hashes
            self._live[request.request_id] = seq
            if problem is None:
                self._add_output(seq, output_ids)
                self.handovers.open(seq, reserve=reserve, handover=handover)
                self._waiting.push(seq)
            else:
                self._finish(seq, End(FinishReason.ERROR, *problem))

    def abort(
        self, request_id: str, error: str | None = None, code: ErrorCode | None = None
    ) -> None:
        """End a request, with ERROR if there is an `error`. An unknown id is no error: the request
        has just finished."""
        seq = self._live.get(request_id)
        if seq is not None:
            reason = FinishReason.ABORT if error is None else FinishReason.ERROR
            self._finish(seq, End(reason, error, code))

    def abort_all(self, reason: str, code: ErrorCode | None = None) -> list[Finished]:
        """End every live request with ERROR; returns their last events."""
        for seq in list(self._live.values()):
            self._finish(seq, End(FinishReason.ERROR, reason, code))
        events, self._events = self._events, []
        return [event for event in events if isinstance(event, Finished)]

    def resume(self, message: Resume) -> None:
        """Run a sequence that was reserved. It may have ended."""
        if not self.handovers.is_reserved(message.request_id):
            return
        seq, num_computed, output_ids = self.handovers.resume(message)
        self._add_output(seq, output_ids)
        if message.handed is None:
            num_computed = self._looked_back(seq, min(num_computed, len(seq.token_ids) - 1))
        self._run(seq, num_computed)
        self._kv.publish(seq)
        self._blocked = None

    def pages_to_send(self) -> list[Pages]:
        """What the last step has computed for other engines. It is there until the next plan."""
        leaving, self._leaving = self._leaving, []
        return [*self.handovers.to_send(), *leaving]

    def has_work(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._running or self._events or self._released) or self._may_start()

    def draft_with(self, lookahead: int, lookup: Lookup | None) -> None:
        """From the next step on, plan for another proposer, also for running rows.

        Args:
            lookahead: slots that the proposer needs after the last token of a row. As many cached
                tokens are computed again, so that it sees their hidden states.
            lookup: finds drafts in a sequence's own text, where they are better.
        """
        self._drafts = DraftRoom(self._kv, self._max_len, lookahead, lookup, self._grammars)
        self._blocked = None

    def candidates(self) -> list[Candidate]:
        """The sequences that decode in the next step."""
        return [self._drafts.candidate(seq) for seq in self._decoding()]

    def schedule(self, choice: Choice = PLAIN) -> StepPlan:
        """Choose the tokens of the next step and reserve their slots, and slots for the chosen
        draft trees where there is room."""
        plan = self._new_plan()
        missing = {seq.request_id: len(seq.token_ids) - seq.num_computed for seq in self._running}
        if self._prompts_to_compute(missing):
            plan.spare //= 2  # so that trees do not hold up prompts
        before = list(self._running)
        for seq in before:
            if missing[seq.request_id] == 1 and seq.status is Status.RUNNING:
                self._plan_row(plan, seq, 1)
        self._drafts.share_budget(plan, self._running, choice)
        for seq in before:
            if missing[seq.request_id] > 1:
                self._plan_prompt(plan, seq, missing[seq.request_id])
        if plan.preempted_any:
            plan.drop_drafts()
        else:
            self._admit(plan)
            self._drafts.reserve_slots(plan, self._running, choice.shape)
        self.handovers.admitted(plan.rows.keys())
        released, self._released = self._released, []
        return plan.build(released, choice.shape)

    def schedule_ahead(
        self, before: StepPlan, choose: Callable[[Rows[Candidate]], Choice]
    ) -> StepPlan | None:
        """The step that follows `before`, whose outcome is not known yet; None if planning needs
        the outcome. `choose` gives the trees for the rows of a step."""
        drawing = {row.line for row in before.rows if row.samples}
        if self._may_start() or not self._by_line.keys() <= drawing:
            return None
        if self._grammars is not None and self._grammars.any_runs:
            return None  # the tokens that a grammar allows depend on the outcome
        budget = self._limits.max_num_batched_tokens
        return plan_ahead(before, self._running, self._drafts, budget, choose)

    def update(self, plan: StepPlan, outcome: StepOutcome) -> list[Event]:
        """Apply the outcome of a step whose rows all still run (see `without_ended`). Returns the
        events for clients, in order."""
        if self._drafts.lookup is not None:
            self._drafts.lookup.observe(plan, outcome)
        for row, result in zip(plan.rows, outcome.rows, strict=True):
            self._advance(self._by_line[row.line], row, result)
        if plan.rows:
            self._num_steps += 1
            self._counts.add_step(tree_name(plan), outcome.seconds)
            self._counts.num_faults = outcome.draft_faults
            self._counts.failed = outcome.draft_failed
        self._last_tokens = plan.num_tokens
        events, self._events = self._events, []
        return events

    def observe_time(self, plan: StepPlan, seconds: float) -> None:
        """Learn how many seconds the step of a plan took."""
        self._times.observe(plan, seconds)

    def without_ended(self, plan: StepPlan, outcome: StepOutcome) -> tuple[StepPlan, StepOutcome]:
        """Drop rows that ended while the step was in flight: their results are neither sent nor
        counted. Their lines have no new sequence yet: only `schedule` gives lines away, and it is
        called only when no step is in flight."""
        return keep_lines(plan, outcome, self._by_line)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_usage=self._kv.usage,
            prefix_queries=self._kv.prefix_queries,
            prefix_hits=self._kv.prefix_hits - self._num_looked_back,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
            last_step_tokens=self._last_tokens,
            num_unsound=self._answers.num_unsound,
            **self._counts.stats(),
        )

    def audit(self) -> None:
        """Assert that sequences, queue and blocks are consistent."""
        reserved = self.handovers.reserved
        self._kv.audit([*self._running, *reserved])
        assert len(self._live) == len(self._running) + len(self._waiting) + len(reserved)
        assert self._running == sorted(self._running, key=_rank)
        assert self._by_line == {seq.line: seq for seq in self._running}
        lines = [*self._by_line, *self._free_lines, *(seq.line for seq in reserved)]
        assert sorted(lines) == list(range(self._limits.max_num_seqs))
        for seq in self._running:
            assert 0 <= seq.num_computed < len(seq.token_ids)
            assert len(seq.block_ids) >= self._kv.blocks_for(seq.num_computed)

    def _next_rank(self, request: Request) -> Rank:
        self._num_submitted += 1
        self._num_requests += request.choice == 0
        return request.priority, self._num_requests + request.choice, self._num_submitted

    def _new_plan(self) -> PlanBuilder:
        """An empty plan. Beside decoding rows, prompts get only so much time that these reach the
        goal for their tokens."""
        num_decoding, goal = len(self._decoding()), self._limits.token_time
        room = self._times.room(goal) if num_decoding and goal is not None else None
        limit = None if room is None else PromptTime(self._times, room)
        return PlanBuilder(self._limits.max_num_batched_tokens, num_decoding, limit)

    def _decoding(self) -> list[Sequence]:
        """Running sequences of which only the newest token is not computed."""
        return [seq for seq in self._running if len(seq.token_ids) - seq.num_computed == 1]

    def _prompts_to_compute(self, missing: dict[str, int]) -> bool:
        """Whether a running or waiting prompt could use budget in this step."""
        return self._may_start() or any(count > 1 for count in missing.values())

    def _may_start(self) -> bool:
        """Whether a sequence waits that could get a line, and is not known to lack blocks."""
        best = self._waiting.best_priority
        if best is None or self._is_blocked():
            return False
        return bool(self._free_lines) or choose_outranked(self._running, best, 0) is not None

    def _is_blocked(self) -> bool:
        """Whether the next waiting sequence was refused blocks, and nothing has changed for it."""
        seq = self._blocked
        if seq is None or self._waiting.peek() is not seq:
            return False
        return not (seq.uses_prefix_cache and self._kv.may_match_more(seq))

    def _plan_prompt(self, plan: PlanBuilder, seq: Sequence, missing: int) -> None:
        """Plan a chunk of a running prompt, after the waiting ones that are more important."""
        if not plan.preempted_any:
            self._admit(plan, above=seq)
        if seq.status is Status.RUNNING and seq.line not in plan.rows:
            self._plan_row(plan, seq, missing)

    def _plan_row(self, plan: PlanBuilder, seq: Sequence, missing: int) -> None:
        """Plan as much of a running sequence as the budget allows; preempt if slots are missing."""
        num_tokens = min(missing, plan.budget)
        if missing > 1:
            num_tokens = plan.chunk(num_tokens, seq.num_computed)
        if num_tokens == 0:
            return
        while not self._kv.reserve(seq, self._drafts.slots(seq, num_tokens)):
            if self._reclaim(plan):
                continue
            victim = choose_victim(self._running)
            plan.preempted_any = True
            self._preempt(plan, victim)
            if victim is seq:
                return
        if self.handovers.is_new(seq.line):
            plan.admit(seq, num_tokens, self.handovers.state(seq.line))
        else:
            plan.add(seq, num_tokens)

    def _reclaim(self, plan: PlanBuilder) -> bool:
        """Free blocks that sequences hold only for draft nodes of earlier steps."""
        num_free = self._kv.num_free
        for seq in self._running:
            row = plan.rows.get(seq.line)
            self._kv.trim(seq, self._drafts.slots(seq, 0 if row is None else row.num_tokens))
        return self._kv.num_free > num_free

    def _admit(self, plan: PlanBuilder, above: Sequence | None = None) -> None:
        """Start waiting sequences in order, while there are lines, budget and blocks. If one does
        not fit, it keeps its place and none after it starts.

        Args:
            above: start only sequences of a smaller priority than that of this one.
        """
        while plan.takes_prompts and plan.num_admitted_blocks < ADMITTED_BLOCKS:
            best = self._waiting.best_priority
            if best is None or (above is not None and best >= above.rank[0]):
                return
            if self._is_blocked() or not (self._free_lines or self._make_way(plan, best, 0)):
                return
            seq = self._waiting.peek()
            assert seq is not None
            if not self._is_hashed(seq):
                return
            cached = self._give_first_blocks(plan, seq)
            if cached is not None:
                self._waiting.pop()
                if not self._reserve(seq, cached):
                    self._start(plan, seq, cached)
            elif not (self._reclaim(plan) or self._make_way(plan, best, seq.num_lacking_blocks)):
                self._blocked = seq
                return

    def _is_hashed(self, seq: Sequence) -> bool:
        """Whether a sequence can be looked up in the prefix cache; a long one is hashed in several
        steps, so that no running row waits for it."""
        if not self._running or not seq.uses_prefix_cache:
            return True
        return self._kv.hash_prefix(seq, HASHED_BLOCKS)

    def _make_way(self, plan: PlanBuilder, priority: int, num_lacking: int) -> bool:
        """Preempt a sequence of a larger priority than this; False if there is none, or all of them
        together do not hold `num_lacking` blocks."""
        victim = choose_outranked(self._running, priority, num_lacking)
        if victim is not None:
            self._preempt(plan, victim)
        return victim is not None

    def _give_first_blocks(self, plan: PlanBuilder, seq: Sequence) -> int | None:
        """The number of tokens found in the prefix cache; None if there are too few blocks."""
        handed = self.handovers.wants(seq)  # it needs all its blocks, and one for its first root
        lookahead = self._drafts.lookahead + handed
        return self._kv.start(
            seq,
            len(seq.token_ids) if handed else plan.budget,
            match=seq.uses_prefix_cache,
            # one spare block per running row, so that growth does not preempt it at once
            spare=len(self._running),
            lookahead=min(lookahead, self._max_len - len(seq.token_ids)),
        )

    def _reserve(self, seq: Sequence, cached: int) -> bool:
        """Whether a sequence that has its blocks waits for another engine from now on."""
        if not self.handovers.wants(seq):
            return False
        num_slots = min(len(seq.token_ids) + self._drafts.lookahead, self._max_len)
        event = self.handovers.reserve(seq, cached, num_slots)
        if event is not None:
            self._take_line(seq, cached)
            seq.status = Status.RESERVED
            self._events.append(event)
        return event is not None

    def _start(self, plan: PlanBuilder, seq: Sequence, cached: int) -> None:
        """Let a sequence run whose first blocks hold `cached` computed tokens."""
        cached = self._looked_back(seq, cached)
        missing = len(seq.token_ids) - cached
        self._take_line(seq, cached)
        self._run(seq, cached)
        plan.admit(seq, max(1, plan.chunk(min(missing, plan.budget), cached)))

    def _take_line(self, seq: Sequence, cached: int) -> None:
        """A sequence that has blocks waits no longer."""
        seq.own_tokens()
        seq.line = self._free_lines.pop()
        if seq.first_scheduled_time is None:
            seq.first_scheduled_time = self._clock()
            seq.num_cached = cached
            self._waiting.charge(seq.request.client, len(seq.token_ids) - cached)

    def _looked_back(self, seq: Sequence, cached: int) -> int:
        """How many cached tokens need not be computed again."""
        if not seq.uses_prefix_cache:
            return 0
        looked_back = min(cached, self._drafts.lookahead)
        self._num_looked_back += looked_back
        return cached - looked_back

    def _run(self, seq: Sequence, num_computed: int) -> None:
        """A sequence that has a line is running from now on."""
        seq.status = Status.RUNNING
        seq.num_computed = num_computed
        self._by_line[seq.line] = seq
        if self._grammars is not None:
            self._grammars.start(seq.line, seq.request_id)
        bisect.insort(self._running, seq, key=_rank)

    def _add_output(self, seq: Sequence, output_ids: Rows[int]) -> None:
        """Tokens that another engine has drawn."""
        if output_ids:
            seq.own_tokens()
            seq.token_ids += output_ids
            if self._grammars is not None:
                self._grammars.take(seq.request_id, output_ids)

    def _preempt(self, plan: PlanBuilder, seq: Sequence) -> None:
        """Free a sequence's blocks; later it starts over from the prefix that is still cached."""
        plan.remove(seq)
        self._stop_running(seq)
        seq.status = Status.WAITING
        seq.num_computed = 0
        seq.num_preemptions += 1
        self._num_preemptions += 1
        self._waiting.push(seq)

    def _stop_running(self, seq: Sequence) -> None:
        self._running.remove(seq)
        del self._by_line[seq.line]
        self._free_lines.append(seq.line)
        if not self.handovers.forget_line(seq.line):
            self._released.append(seq.line)
        if self._drafts.lookup is not None:
            self._drafts.lookup.forget(seq.line)
        if self._grammars is not None:
            self._grammars.stop(seq.line)
        self._answers.forget(seq)
        self._kv.release(seq)
        self._blocked = None

    def _advance(self, seq: Sequence, row: RowPlan, result: RowOutcome) -> None:
        """Give a row's outcome to its sequence, which may end, or leave for another engine."""
        taken = self._answers.take(seq, row, result, self._drafts.round_of(row, result))
        emitted = [] if taken.event is None else taken.event.token_ids
        if taken.event is not None:
            self._events.append(taken.event)
        if row.samples and not taken.failed:
            self._waiting.charge(seq.request.client, OUTPUT_WEIGHT * len(emitted))
            self._count_draft(seq, row, result, len(emitted))
        if taken.end is not None:
            self._finish(seq, taken.end)
        elif row.samples:
            self._hand_over(seq, emitted)

    def _hand_over(self, seq: Sequence, output_ids: Rows[int]) -> None:
        """Let a sequence leave for the engine that decodes it, if there is one."""
        num_slots = min(len(seq.token_ids) - 1 + self._drafts.lookahead, self._max_len)
        pages = self.handovers.leaving(seq, tuple(output_ids), num_slots)
        if pages is not None:
            self._leaving.append(pages)
            self._stop_running(seq)
            self._close(seq)

    def _close(self, seq: Sequence) -> None:
        """Forget a sequence that has ended here."""
        seq.status = Status.FINISHED
        del self._live[seq.request_id]
        self.handovers.close(seq)
        if self._grammars is not None:
            self._grammars.close(seq.request_id)

    def _count_draft(self, seq: Sequence, row: RowPlan, result: RowOutcome, num_kept: int) -> None:
        num_accepted = min(num_kept, max(len(result.emitted) - 1, 0))
        self._counts.add_tree(result.num_draft, num_accepted)
        lookup = self._drafts.lookup
        predicted = bool(row.draft) and lookup is not None and lookup.is_predicted(row.line)
        count_draft(seq, result.num_draft, num_accepted, predicted)

    def _finish(self, seq: Sequence, end: End) -> None:
        if seq.status is Status.RUNNING:
            self._stop_running(seq)
        elif seq.status is Status.RESERVED:
            self._free_lines.append(seq.line)
            self._kv.release(seq)
            self._blocked = None
        elif seq in self._waiting:
            self._waiting.remove(seq)
            self._blocked = None
        self._close(seq)
        if self._on_finish is not None:
            self._on_finish(seq, end.reason)
        self._events.append(finished_event(seq, end))


def _rank(seq: Sequence) -> Rank:
    return seq.rank
