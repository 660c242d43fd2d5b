"""An executor without a model: keeps a pretended KV cache and checks every plan against it.

The next token is a hash of all tokens before it, so `expected_text` gives the text of each request
without an engine. Draft nodes overwrite their slots; some of them are accepted. A pretended draft
head keeps its own entries in the slots, like the KV of a real head.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from engine.completion import Completion
from engine.kv.manager import KVManager
from engine.messages import Finished, TokenLogprob, Tokens
from engine.request import FinishReason, Request
from engine.request import Sequence as SequenceState
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.scheduler import Scheduler
from engine.speculation.lookup import Lookup
from engine.speculation.planner import Choice
from engine.step.executor import Launched, execute
from engine.step.plan import RowOutcome, RowPlan, StepOutcome, StepPlan
from engine.step.shape import ROOT, TreeShape, chain
from tests.support.engines.in_process import ask

EOS = 0
PROMPT_VOCAB = 1_000_000  # ids of prompts; texts use only those below `vocab_size`


def request(
    name: str, prompt: list[int], *, priority: int = 0, client: str = "", **params: object
) -> Request:
    """Runs to its `max_tokens` unless told otherwise."""
    plain = ask(name, prompt, **({"ignore_eos": True} | params))
    return msgspec.structs.replace(plain, priority=priority, client=client)


def choices_of(first: Request, count: int) -> list[Request]:
    """So many choices of one request; they have one prompt."""
    return [
        msgspec.structs.replace(first, request_id=f"{first.request_id}{number}", choice=number)
        for number in range(count)
    ]


def prompt_of(length: int, first: int = 1000) -> list[int]:
    return list(range(first, first + length))


def shape(plan: StepPlan, names: Mapping[int, str]) -> list[tuple[str, int, int, bool]]:
    """(request, first position, number of tokens, whether one is drawn) of each row."""
    return [(names[row.line], row.start, len(row.token_ids), row.samples) for row in plan.rows]


def fingerprints(token_ids: Iterable[int]) -> list[int]:
    """For each position, a hash of the tokens up to it, on which its KV depends."""
    found, last = [], 0
    for token in token_ids:
        last = hash((last, token))  # hashes of integers are equal in every process
        found.append(last)
    return found


def next_token(token_ids: Iterable[int], vocab_size: int) -> int:
    return [0, *fingerprints(token_ids)][-1] % vocab_size


def expected_text(request: Request, max_len: int, vocab_size: int) -> list[int]:
    """The output of a request that runs alone and is not aborted."""
    params, history = request.params, list(request.prompt_ids)
    ends = {*params.stop_token_ids} | (set() if params.ignore_eos else {EOS})
    output: list[int] = []
    while len(output) < params.max_tokens and len(history) < max_len:
        output.append(next_token(history, vocab_size))
        history.append(output[-1])
        if output[-1] in ends and len(output) > params.min_tokens:
            break
    return output


@dataclass
class FakeRow:
    """The runner's state of a running sequence."""

    request: Request
    history: list[int]  # prompt + output
    num_computed: int = 0
    block_ids: tuple[int, ...] = ()


@dataclass
class DraftTotals:
    """Verified and accepted drafts, as counted by the executor."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_emitted: int = 0


class FakeExecutor:
    """Executes plans like `ModelRunner`; asserts that the slots suffice to compute each row."""

    def __init__(
        self, block_size: int, vocab_size: int, max_len: int = 10**9, *, drafts: bool = False
    ) -> None:
        self.rows: dict[int, FakeRow] = {}  # by line
        self.totals = DraftTotals()
        self._max_len = max_len
        self._drafts = drafts
        self.always_reject = False
        self._luck = random.Random(0)
        self._entries: dict[int, tuple[int, int]] = {}  # the draft head's: like _stored
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._stored: dict[int, tuple[int, int]] = {}  # slot -> (position, fingerprint)

    def launch(self, plan: StepPlan) -> Launched:
        outcome = self._outcomes(plan)
        return Launched(plan, lambda: outcome)

    def collect(self, launched: Launched) -> StepOutcome:
        return launched.wait()

    def _outcomes(self, plan: StepPlan) -> StepOutcome:
        for line in plan.released:
            del self.rows[line]
        for admission in plan.admitted:
            assert admission.line not in self.rows
            history = [*admission.request.prompt_ids, *admission.output_ids]
            self.rows[admission.line] = FakeRow(admission.request, history)
        lines = [row.line for row in plan.rows]
        assert len(lines) == len(set(lines)), "a sequence has two rows"
        for row in plan.rows:
            known = self.rows[row.line]
            assert row.first_block <= len(known.block_ids)
            known.block_ids = known.block_ids[: row.first_block] + row.new_blocks
        for row in plan.rows:
            self._check_nodes(row, plan.shape)
            self._write(row)
        self._check_tails(plan.rows)
        for row in plan.rows:  # after all writes, as in attention
            self._check_reads(row)
        outcomes = tuple(self._outcome(row) for row in plan.rows)
        for row, outcome in zip(plan.rows, outcomes, strict=True):
            self._extend(row, len(outcome.emitted))
        return StepOutcome(outcomes)

    def decoding(self) -> set[int]:
        """The lines of running sequences that miss only their newest token."""
        return {line for line, row in self.rows.items() if row.num_computed == len(row.history) - 1}

    def names(self) -> dict[int, str]:
        """Request ids by line."""
        return {line: row.request.request_id for line, row in self.rows.items()}

    def _write(self, plan: RowPlan) -> None:
        row, end = self.rows[plan.line], plan.start + len(plan.token_ids)
        assert plan.token_ids, "an empty row"
        assert list(plan.token_ids) == row.history[plan.start : end]
        assert plan.samples == (end == len(row.history))
        marks = fingerprints(row.history[:end])
        for position in range(plan.start, end):
            self._stored[self._slot(plan, position)] = (position, marks[position])
        row.num_computed = end

    def _check_nodes(self, plan: RowPlan, shape: TreeShape) -> None:
        """Assert that nodes hang below the only token of a row, within its limits, with their own
        slots, and that the entries that the draft head reads for them exist."""
        if plan.num_draft == 0:
            return
        request, root = self.rows[plan.line].request, plan.start
        num_output = root + 1 - len(request.prompt_ids)
        assert plan.samples
        assert len(plan.token_ids) == 1
        if plan.draft:
            assert plan.num_draft == len(plan.draft)
            assert num_output + plan.num_draft < request.params.max_tokens, "nodes for nothing"
            shape = chain(plan.num_draft)
        assert plan.num_draft < shape.num_nodes
        assert request.max_draft_nodes is None or plan.num_draft <= request.max_draft_nodes
        assert num_output + 1 < request.params.max_tokens, "only the bonus token is missing"
        last = root + shape.slots_for(1 + plan.num_draft) - 1
        assert last < self._max_len
        assert root + 1 + plan.num_draft < self._max_len, "the bonus token has no place"
        for position in range(root + 1, last + 1):
            self._stored[self._slot(plan, position)] = (-1, position)  # a node, until accepted
        if self._drafts:
            marks = fingerprints(self.rows[plan.line].history)
            for position in range(1, root + 1):
                found = self._entries.get(self._slot(plan, position))
                assert found == (position, marks[position]), f"no entry for position {position}"

    def _check_tails(self, plans: Sequence[RowPlan]) -> None:
        """Assert that rows share no block that they write to."""
        blocks = [self.rows[plan.line].block_ids for plan in plans]
        starts = [plan.start // self._block_size for plan in plans]
        tails = [own[start:] for own, start in zip(blocks, starts, strict=True)]
        for plan, tail in zip(plans, tails, strict=True):
            for other, own in zip(plans, blocks, strict=True):
                shared = set(tail[self._shared_block(plan) :]) & set(own)
                assert other is plan or not shared, f"line {plan.line} writes to foreign blocks"

    def _shared_block(self, plan: RowPlan) -> int:
        """1 if the row begins with a cached token that is computed again for the draft head, which
        does not change its block; else 0."""
        again = (plan.start + 1) % self._block_size == 0
        return int(self._drafts and again)

    def _extend(self, plan: RowPlan, num_emitted: int) -> None:
        """The draft head's entries of all tokens that follow a computed one."""
        if not self._drafts:
            return
        marks = fingerprints(self.rows[plan.line].history)
        end = plan.start + len(plan.token_ids) + max(1, num_emitted)
        for position in range(plan.start + 1, min(end, self._max_len)):
            self._entries[self._slot(plan, position)] = (position, marks[position])

    def _check_reads(self, plan: RowPlan) -> None:
        history = self.rows[plan.line].history[: plan.start + len(plan.token_ids)]
        for position, mark in enumerate(fingerprints(history)):
            found = self._stored.get(self._slot(plan, position))
            assert found == (position, mark), f"line {plan.line}: foreign KV at {position}"

    def _slot(self, plan: RowPlan, position: int) -> int:
        block, offset = divmod(position, self._block_size)
        return self.rows[plan.line].block_ids[block] * self._block_size + offset

    def _outcome(self, plan: RowPlan) -> RowOutcome:
        row = self.rows[plan.line]
        scores = None
        if row.request.params.prompt_logprobs is not None:
            first = plan.start + 1
            targets = row.request.prompt_ids[first : first + len(plan.token_ids)]
            scores = tuple(TokenLogprob(token, -1.0, []) for token in targets)
        if not plan.samples:
            return RowOutcome(prompt_logprobs=scores)
        num_draft, num_accepted = self._verified(plan, row.history)
        for _ in range(num_accepted + 1):
            row.history.append(next_token(row.history, self._vocab_size))
        emitted = tuple(row.history[-num_accepted - 1 :])
        marks = fingerprints(row.history)
        for position in range(row.num_computed, row.num_computed + num_accepted):
            self._stored[self._slot(plan, position)] = (position, marks[position])
        row.num_computed += num_accepted
        self.totals.num_drafts += num_draft > 0
        self.totals.num_draft_tokens += num_draft
        self.totals.num_emitted += len(emitted)
        path = tuple(range(1, num_accepted + 1))
        return RowOutcome(emitted, num_draft, path, prompt_logprobs=scores)

    def _verified(self, plan: RowPlan, history: Sequence[int]) -> tuple[int, int]:
        """The numbers of nodes and of accepted nodes: a draft in the plan is accepted as far as it
        matches the text, a proposer's tree at random."""
        if not plan.draft:
            num_draft = self._luck.randint(min(plan.num_draft, 1), plan.num_draft)
            return num_draft, 0 if self.always_reject else self._luck.randint(0, num_draft)
        text = list(history)
        for token in plan.draft:
            if token != next_token(text, self._vocab_size):
                break
            text.append(token)
        return plan.num_draft, len(text) - len(history)


@dataclass
class FakeEngine:
    """A scheduler over a `FakeExecutor`, stepped by the test and audited at every step."""

    num_blocks: int = 64
    block_size: int = 4
    prefix_caching: bool = True
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    max_model_len: int = 64
    vocab_size: int = 97
    lookahead: int = 0  # 1: with a draft head
    shapes: tuple[TreeShape, ...] = (ROOT,)  # one after the other, step by step
    lookup: bool = False
    on_finish: Callable[[SequenceState, FinishReason], None] | None = None
    scheduler: Scheduler = field(init=False)
    executor: FakeExecutor = field(init=False)
    heard: dict[str, Completion] = field(default_factory=dict)
    submitted: dict[str, Request] = field(default_factory=dict)
    now: float = 0.0  # what the scheduler's clock says
    num_steps: int = 0
    names: dict[int, str] = field(default_factory=dict)  # by line, of the newest plan

    def __post_init__(self) -> None:
        limits = SchedulerLimits(
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.max_model_len,
        )
        kv = KVManager(self.num_blocks, self.block_size, self.prefix_caching)
        self.scheduler = Scheduler(
            limits,
            kv,
            frozenset({EOS}),
            vocab_size=PROMPT_VOCAB,
            clock=lambda: self.now,
            on_finish=self.on_finish,
        )
        self.scheduler.draft_with(self.lookahead, Lookup() if self.lookup else None)
        self.executor = FakeExecutor(
            self.block_size, self.vocab_size, self.max_len, drafts=self.lookahead > 0
        )

    @property
    def max_len(self) -> int:
        return min(self.max_model_len, self.num_blocks * self.block_size)

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.submit(request)
            self._expect(request)

    def submit_choices(self, *choices: Request) -> None:
        """Submit choices of one request."""
        self.scheduler.submit(*choices)
        for choice in choices:
            self._expect(choice)

    def _expect(self, *requests: Request) -> None:
        for request in requests:
            self.submitted[request.request_id] = request
            self.heard[request.request_id] = Completion()

    def step(self) -> StepPlan:
        """Run one step; messages to clients are collected in `heard`."""
        decoding = self.executor.decoding()
        before = {line: row.request for line, row in self.executor.rows.items()}
        num_preemptions = self.scheduler.stats().num_preemptions
        plan = self.scheduler.schedule(Choice(self.shapes[self.num_steps % len(self.shapes)]))
        self.num_steps += 1
        if self.scheduler.stats().num_preemptions > num_preemptions:
            self._check_preemption(plan, before)
        assert plan.num_tokens <= self.max_num_batched_tokens
        planned = {row.line for row in plan.rows}
        assert decoding <= planned | set(plan.released), "a decoding sequence stood still"
        outcome = execute(self.executor, plan)
        self.names |= self.executor.names()
        assert len(self.executor.rows) <= self.max_num_seqs
        for event in self.scheduler.update(plan, outcome):
            self._hear(event)
        self.scheduler.audit()
        return plan

    def _check_preemption(self, plan: StepPlan, before: Mapping[int, Request]) -> None:
        """Assert that sequences were preempted for more important ones that waited, or because
        blocks ran out; then neither nodes nor sequences that start get any."""
        preempted = [
            before[line].priority
            for line in plan.released
            if line in before and self.heard[before[line].request_id].finished is None
        ]
        running = {request.request_id for request in before.values()}
        waited = [
            request.priority
            for name, request in self.submitted.items()
            if self.heard[name].finished is None and name not in running
        ]
        if any(priority < max(preempted) for priority in waited):
            return
        assert plan.admitted == (), "admitted where blocks have just run out"
        assert all(row.num_draft == 0 for row in plan.rows), "nodes where blocks have run out"

    def run(self) -> list[StepPlan]:
        """Step until idle; return the plans that had rows."""
        plans = []
        while self.scheduler.has_work():
            plans.append(self.step())
        self.check_idle()
        return [plan for plan in plans if plan.rows]

    def run_shapes(self) -> list[list[tuple[str, int, int, bool]]]:
        """As `run`, but returns the `shape` of each plan, since lines may change their request."""
        found = []
        while self.scheduler.has_work():
            plan = self.step()
            if plan.rows:
                found.append(shape(plan, self.names))
        self.check_idle()
        return found

    def check_idle(self) -> None:
        """Assert that every request has ended with the text that it has when alone, and that no
        block is in use."""
        for name, request in self.submitted.items():
            self.check_text(request, self.heard[name])
        assert self.executor.rows == {}
        assert self.scheduler.stats().kv_usage == 0

    def check_text(self, request: Request, record: Completion) -> None:
        expected = expected_text(request, self.max_len, self.vocab_size)
        assert record.finished is not None
        assert record.finished.num_output == len(record.token_ids)
        if record.finished.reason in (FinishReason.ABORT, FinishReason.ERROR):
            expected = expected[: len(record.token_ids)]
        assert record.token_ids == expected

    def _hear(self, event: Tokens | Finished) -> None:
        record = self.heard[event.request_id]
        assert record.finished is None, "an event after the last one"
        if isinstance(event, Finished):
            record.finished = event
        else:
            record.token_ids += event.token_ids
            record.prompt_logprobs += event.prompt_logprobs or []
