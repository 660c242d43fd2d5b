"""Continuous batching under one rule: let `num_computed` of every sequence catch up.

Each step spends a budget of tokens in this order: sequences that miss only their newest token (so
that a long prompt never stops decoding), then running prompts, then new admissions. Within each
group, and for preemption, importance counts: priority, then arrival, then submission.

Draft nodes get what the roots leave of the budget, half of it while a prompt is to be computed,
and blocks that nobody else wants in this step.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.kv.manager import KVManager
from engine.messages import EngineStats, ErrorCode, Finished, TokenLogprob, Tokens
from engine.request import FinishReason, Request, Sequence, Status
from engine.scheduler.draft_counts import DraftCounts
from engine.scheduler.draft_room import DraftRoom
from engine.scheduler.plan_ahead import only, plan_ahead
from engine.scheduler.plan_draft import PlanDraft
from engine.scheduler.stopping import cut_emitted
from engine.scheduler.waiting import Rank, WaitingQueue
from engine.speculation.lookup import Lookup, tree_name
from engine.step.plan import Admission, RowOutcome, RowPlan, StepOutcome, StepPlan
from engine.step.shape import ROOT, TreeShape

LONG_CONTEXT = 2048  # tokens behind which attention begins to rule the time of a step


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """How much may happen at once."""

    max_num_seqs: int  # running sequences
    max_num_batched_tokens: int  # tokens in one step
    max_model_len: int  # prompt + output tokens of one sequence
    # What a proposer with state of its own needs: slots behind the last token of a row, and cached
    # tokens that are computed once more to see their hidden states.
    lookahead: int = 0
    lookback: int = 0

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, max_num_seqs is "
                f"{self.max_num_seqs}: a step must have room for one token of every sequence"
            )


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
        lookup: Lookup | None = None,
    ) -> None:
        """`lookup`: drafts from a sequence's own text, where those are the better ones."""
        self._limits = limits
        self._kv = kv
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._clock = clock
        self._max_len = min(limits.max_model_len, kv.capacity)
        self._drafts = DraftRoom(kv, self._max_len, limits.lookahead, lookup)
        self._lookup = lookup
        self._live: dict[str, Sequence] = {}
        self._ranks: dict[str, Rank] = {}
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # most important first
        self._released: list[str] = []  # left the running set since the last plan
        self._events: list[Tokens | Finished] = []  # from outside a step: aborts, rejections
        self._prompt_scores: dict[str, list[TokenLogprob | None]] = {}
        self._counts = DraftCounts()
        self.on_finish: Callable[[Sequence, FinishReason], None] | None = None
        self._num_submitted = self._num_preemptions = self._num_steps = self._last_tokens = 0
        self._num_looked_back = 0  # cached tokens that were computed once more

    def submit(self, request: Request) -> None:
        """Queue a request. One that can never run gets its `Finished` at once.

        Raises:
            ValueError: the id belongs to a request that is still live.
        """
        if request.request_id in self._live:
            raise ValueError(f"request_id {request.request_id!r} is in use by a live request")
        seq = Sequence.from_request(request)
        self._live[request.request_id] = seq
        self._num_submitted += 1
        rank = (request.priority, request.arrival_time, self._num_submitted)
        self._ranks[request.request_id] = rank
        problem = self._impossible(request)
        if problem is None:
            self._waiting.push(rank, seq)
        else:
            self._finish(seq, FinishReason.ERROR, *problem)

    def abort(self, request_id: str) -> None:
        """End a request wherever it is. An unknown id is one that has just finished: no error."""
        seq = self._live.get(request_id)
        if seq is not None:
            self._finish(seq, FinishReason.ABORT)

    def abort_all(self, reason: str, code: ErrorCode | None = None) -> list[Finished]:
        """End every live request with ERROR; returns their last events."""
        for seq in list(self._live.values()):
            self._finish(seq, FinishReason.ERROR, reason, code)
        events, self._events = self._events, []
        return [event for event in events if isinstance(event, Finished)]

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._live or self._events or self._released)

    def draft_with(self, lookahead: int) -> None:
        """Plan for another proposer, also for rows that run already."""
        self._limits = replace(self._limits, lookahead=lookahead, lookback=lookahead)
        self._drafts = replace(self._drafts, lookahead=lookahead)

    def look_up(self, lookup: Lookup | None) -> None:
        """Find drafts in the text with `lookup` from the next step on."""
        self._lookup = lookup
        self._drafts = replace(self._drafts, lookup=lookup)

    @property
    def num_drafting(self) -> int:
        """Sequences that could carry a draft tree in the next step, if there is room."""
        return sum(self._drafts.most_nodes(seq) > 0 for seq in self._decoding())

    def schedule(self, shape: TreeShape = ROOT) -> StepPlan:
        """Choose the tokens of the next step and reserve their slots, also for draft trees of
        `shape` where there is room."""
        draft = PlanDraft(self._limits.max_num_batched_tokens, len(self._decoding()))
        missing = {seq.request_id: len(seq.token_ids) - seq.num_computed for seq in self._running}
        if self._prompts_to_compute(missing):
            draft.spare //= 2  # trees must not keep a prompt from being computed
        for decoding in (True, False):
            for seq in list(self._running):
                if (missing[seq.request_id] == 1) == decoding and seq.status is Status.RUNNING:
                    self._plan_row(draft, seq, missing[seq.request_id])
            if decoding:
                self._drafts.set_aside(draft, self._running, shape)
        if not draft.preempted_any:
            self._admit(draft)
            self._drafts.grow(draft, self._running, shape)
        released, self._released = self._released, []
        admitted = tuple(a for name, a in draft.admitted.items() if name in draft.rows)
        return StepPlan(tuple(draft.rows.values()), admitted, tuple(released), shape)

    def schedule_ahead(
        self, before: StepPlan, choose: Callable[[int], TreeShape]
    ) -> StepPlan | None:
        """The step behind `before`, a decode step whose outcome is not known yet; None if that has
        to be known first. `choose` is told how many rows could draft."""
        missing = {seq.request_id: len(seq.token_ids) - seq.num_computed for seq in self._running}
        if self._lookup is not None or self._prompts_to_compute(missing):
            return None
        budget = self._limits.max_num_batched_tokens
        return plan_ahead(before, self._running, self._drafts, budget, choose)

    def update(self, plan: StepPlan, outcome: StepOutcome) -> list[Tokens | Finished]:
        """Take in what the step produced, all of whose rows still run (see `living`); returns what
        clients must hear, in order."""
        if self._lookup is not None:
            self._lookup.observe(plan, outcome)
        for row, result in zip(plan.rows, outcome.rows, strict=True):
            self._advance(self._live[row.request_id], row, result)
        if plan.rows:
            self._num_steps += 1
            self._counts.add_step(tree_name(plan), outcome.seconds)
            self._counts.num_faults = outcome.draft_faults
            self._counts.failed = outcome.draft_failed
        self._last_tokens = plan.num_tokens
        events, self._events = self._events, []
        return events

    def living(self, plan: StepPlan, outcome: StepOutcome) -> tuple[StepPlan, StepOutcome]:
        """Without rows that ended while the step was in flight: nobody hears or counts that they
        were computed once more. A request of the same id that has come since does not run yet."""
        return only(plan, outcome, {seq.request_id for seq in self._running})

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
            num_drafts=self._counts.num_drafts,
            num_draft_tokens=self._counts.num_draft_tokens,
            num_accepted_tokens=self._counts.num_accepted_tokens,
            accepted_per_position=tuple(self._counts.accepted_per_position),
            steps_by_tree=dict(self._counts.steps_by_tree),
            seconds_by_part=dict(self._counts.seconds_by_part),
            num_draft_faults=self._counts.num_faults,
            draft_failed=self._counts.failed,
        )

    def audit(self) -> None:
        """Assert that sequences, queue and blocks add up."""
        self._kv.audit(self._running)
        assert len(self._live) == len(self._running) + len(self._waiting)
        assert self._running == sorted(self._running, key=self._rank)
        for seq in self._running:
            assert 0 <= seq.num_computed < len(seq.token_ids)
            assert len(seq.block_ids) >= self._kv.blocks_for(seq.num_computed)

    def _rank(self, seq: Sequence) -> Rank:
        return self._ranks[seq.request_id]

    def _impossible(self, request: Request) -> tuple[str, ErrorCode | None] | None:
        """Why this request could never run, even alone."""
        num_prompt = len(request.prompt_ids)
        if num_prompt == 0:
            return "the prompt is empty", None
        if num_prompt + min(request.params.max_tokens, 1) > self._max_len:
            return (
                f"This model's maximum context length is {self._max_len} tokens, but the prompt "
                f"has {num_prompt} tokens and at least one more is to be generated",
                ErrorCode.CONTEXT_LENGTH,
            )
        unknown = self._unknown_id(request)
        return None if unknown is None else (unknown, None)

    def _unknown_id(self, request: Request) -> str | None:
        """The first token id that the model does not have: it would fail a whole step."""
        params = request.params
        for name, ids in (
            ("prompt_ids", request.prompt_ids),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            for token_id in ids:
                if not 0 <= token_id < self._vocab_size:
                    return f"{name} has token id {token_id}; ids end at {self._vocab_size - 1}"
        return None

    def _decoding(self) -> list[Sequence]:
        """Running sequences that miss only their newest token."""
        return [seq for seq in self._running if len(seq.token_ids) - seq.num_computed == 1]

    def _prompts_to_compute(self, missing: dict[str, int]) -> bool:
        """Whether a running or a waiting prompt could use budget in this step."""
        may_start = bool(self._waiting) and len(self._running) < self._limits.max_num_seqs
        return may_start or any(count > 1 for count in missing.values())

    def _plan_row(self, draft: PlanDraft, seq: Sequence, missing: int) -> None:
        """Plan as much of a running sequence as the budget allows, preempting for its slots."""
        num_tokens = min(missing, self._chunk(draft, seq))
        if num_tokens == 0:
            return
        while not self._kv.reserve(seq, self._drafts.slots(seq, num_tokens)):
            if self._reclaim(draft):
                continue
            victim = self._running[-1]
            self._preempt(draft, victim)
            if victim is seq:
                return
        draft.add(seq, num_tokens)

    def _chunk(self, draft: PlanDraft, seq: Sequence) -> int:
        """How many tokens of this sequence the step may compute. Attention makes a token dearer
        with what lies before it; while others decode, long contexts are taken in smaller bites."""
        if draft.num_decoding == 0 or seq.num_computed <= LONG_CONTEXT:
            return draft.budget
        return min(draft.budget, max(1, draft.budget * LONG_CONTEXT // seq.num_computed))

    def _reclaim(self, draft: PlanDraft) -> bool:
        """Take back blocks that sequences hold for nodes of earlier steps only."""
        num_free = self._kv.num_free
        for seq in self._running:
            row = draft.rows.get(seq.request_id)
            self._kv.trim(seq, self._drafts.slots(seq, 0 if row is None else len(row.token_ids)))
        return self._kv.num_free > num_free

    def _admit(self, draft: PlanDraft) -> None:
        """Start waiting sequences in order, while there are rows, budget and blocks. The first
        that does not fit keeps its place, and nobody passes it."""
        while draft.budget and len(self._running) < self._limits.max_num_seqs:
            seq = self._waiting.peek()
            if seq is None:
                return
            cached = self._give_first_blocks(draft, seq)
            if cached is None:
                if self._reclaim(draft):
                    continue
                return
            looked_back = min(cached, self._limits.lookback)
            self._num_looked_back += looked_back
            cached -= looked_back
            self._waiting.pop()
            self._start(seq, cached)
            draft.admitted[seq.request_id] = Admission(
                seq.request, tuple(seq.token_ids[seq.num_prompt :])
            )
            draft.add(seq, min(len(seq.token_ids) - cached, draft.budget))

    def _give_first_blocks(self, draft: PlanDraft, seq: Sequence) -> int | None:
        """The tokens found in the prefix cache; None when there are too few blocks."""
        return self._kv.start(
            seq,
            draft.budget,
            match=seq.request.params.prompt_logprobs is None,
            # one block to grow for each running row, so that an admission is not undone at once
            spare=len(self._running),
            lookahead=min(self._limits.lookahead, self._max_len - len(seq.token_ids)),
        )

    def _start(self, seq: Sequence, cached: int) -> None:
        seq.status = Status.RUNNING
        seq.num_computed = cached
        if seq.first_scheduled_time is None:
            seq.first_scheduled_time = self._clock()
            seq.num_cached = cached
        bisect.insort(self._running, seq, key=self._rank)

    def _preempt(self, draft: PlanDraft, seq: Sequence) -> None:
        """Take a sequence's blocks away; it starts over from the prefix that is still cached."""
        draft.preempted_any = True
        draft.take_out(seq.request_id)
        self._stop_running(seq)
        seq.status = Status.WAITING
        seq.num_computed = 0
        seq.num_preemptions += 1
        self._num_preemptions += 1
        self._waiting.push(self._rank(seq), seq)

    def _stop_running(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._released.append(seq.request_id)
        self._prompt_scores.pop(seq.request_id, None)
        self._kv.release(seq)

    def _advance(self, seq: Sequence, row: RowPlan, result: RowOutcome) -> None:
        """Account for a computed chunk and the tokens emitted behind it."""
        seq.num_computed += len(row.token_ids)
        # A preempted sequence computes its prompt again, but clients hear its scores only once.
        if result.prompt_logprobs is not None and seq.num_output == 0:
            self._prompt_scores.setdefault(seq.request_id, [None]).extend(result.prompt_logprobs)
        if not row.samples:
            self._kv.publish(seq)
            return
        kept, reason = cut_emitted(seq, result.emitted, self._eos_token_ids, self._max_len)
        seq.token_ids += kept
        seq.num_computed += max(len(kept) - 1, 0)  # accepted draft tokens have their KV already
        self._count_draft(seq, result, len(kept))
        if kept and seq.first_token_time is None:
            seq.first_token_time = self._clock()
        self._kv.publish(seq)
        logprobs = None if result.logprobs is None else list(result.logprobs[: len(kept)])
        scores = self._prompt_scores.pop(seq.request_id, None)
        self._events.append(Tokens(seq.request_id, kept, logprobs, scores))
        if reason is not None:
            self._finish(seq, reason)

    def _count_draft(self, seq: Sequence, result: RowOutcome, num_kept: int) -> None:
        num_accepted = min(num_kept, max(len(result.emitted) - 1, 0))
        self._counts.add_tree(result.num_draft, num_accepted)
        seq.num_drafts += result.num_draft > 0
        seq.num_drafted += result.num_draft
        seq.num_accepted += num_accepted

    def _finish(
        self,
        seq: Sequence,
        reason: FinishReason,
        error: str | None = None,
        code: ErrorCode | None = None,
    ) -> None:
        if seq.status is Status.RUNNING:
            self._stop_running(seq)
        elif seq in self._waiting:
            self._waiting.remove(seq)
        seq.status = Status.FINISHED
        del self._live[seq.request_id], self._ranks[seq.request_id]
        if self._lookup is not None:
            self._lookup.forget(seq.request_id)
        if self.on_finish is not None:
            self.on_finish(seq, reason)
        self._events.append(
            Finished(
                request_id=seq.request_id,
                reason=reason,
                num_prompt=seq.num_prompt,
                num_output=seq.num_output,
                num_cached=seq.num_cached,
                num_preemptions=seq.num_preemptions,
                num_drafts=seq.num_drafts,
                num_drafted=seq.num_drafted,
                num_accepted=seq.num_accepted,
                first_scheduled_time=seq.first_scheduled_time,
                first_token_time=seq.first_token_time,
                error=error,
                error_code=code,
            )
        )
