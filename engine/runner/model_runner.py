"""Runs step plans on a device: propose, forward, verify, commit, extend, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.messages import TokenLogprob
from engine.models.interface import TargetModel
from engine.parallel.trees import share_tree
from engine.runner.committed import collect_committed
from engine.runner.input_builder import InputBuilder
from engine.runner.laps import Laps
from engine.runner.logprobs import emitted_logprobs, prompt_logprobs
from engine.runner.rounds import FlyingRound, Rounds, RoundSettings
from engine.sampling.batch import draw_settings
from engine.sampling.rows import RowState, effective_temperature, unsigned_bits
from engine.sampling.sampler import Sampler
from engine.sampling.spread import SpreadLogits
from engine.speculation.commit import commit
from engine.speculation.proposer import Proposer, Roots, RoundProposer
from engine.speculation.verify import walk
from engine.step.batch import ForwardBatch, ForwardContext
from engine.step.plan import (
    COMMIT,
    DRAFT,
    ROUND,
    VERIFY,
    RowOutcome,
    RowPlan,
    StepOutcome,
    StepPlan,
)
from engine.step.shape import TreeShape
from engine.step.tree import DraftTree, VerifyResult
from engine.transfer import download, upload
from kernels.sampling.pipeline_reference import DrawSettings


@dataclass(frozen=True, slots=True)
class RunnerParts:
    """What a runner is made of, joined where the engine is put together."""

    model: TargetModel
    context: ForwardContext
    inputs: InputBuilder
    sampler: Sampler
    proposer: Proposer
    vocab_size: int
    eos_token_ids: frozenset[int]
    rounds: RoundSettings | None = None  # None: every step goes through the host, best on a CPU


@dataclass(frozen=True, slots=True)
class Ticket:
    """A step that was launched, to be collected once."""

    laps: Laps
    flying: FlyingRound | None = None  # None: the step is over
    outcome: StepOutcome | None = None
    leads: bool = False  # whether a plan that is ahead may follow before this step is collected


class ModelRunner:
    """Executes plans. Keeps per running sequence only what the sampler and the inputs need."""

    def __init__(self, parts: RunnerParts) -> None:
        self._parts = parts
        self._rows: dict[str, RowState] = {}
        self._rounds = _rounds(parts)

    def draft_with(self, proposer: Proposer) -> None:
        """Take trees from another proposer from the next step on. It knows nothing about running
        rows but what they commit from then on."""
        context = replace(self._parts.context, tap=proposer.tap)
        self._parts = replace(self._parts, proposer=proposer, context=context)
        self._rounds = _rounds(self._parts)
        for request_id in self._rows:
            proposer.admit(self._parts.inputs.line(request_id))

    @torch.inference_mode()
    def prepare(self, shapes: Sequence[TreeShape]) -> None:
        """Before the first plan: capture the rounds of trees that are likely to come."""
        if self._rounds is not None:
            self._rounds.prepare(shapes)

    def execute(self, plan: StepPlan) -> StepOutcome:
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Ticket:
        """Tell the device of a decode round, without waiting for it; carry out any other plan. One
        that is ahead may be launched while the step before it is in flight, no other."""
        parts, laps = self._parts, Laps()
        with laps.time(DRAFT):
            if plan.released or plan.admitted:
                parts.proposer.settle()
        self._turn_over(plan)
        if not plan.rows:
            return Ticket(laps, outcome=StepOutcome())
        if self._rounds is not None:
            states = [self._rows[row.request_id] for row in plan.rows]
            planned = self._rounds.plan(plan, states)
            if planned is not None:
                with laps.time(ROUND):
                    flying = self._rounds.launch(plan, states, planned)
                # What a proposer puts off, it has done by now: it does not fail before the next.
                return Ticket(laps, flying, leads=not parts.proposer.failed)
        assert not plan.ahead, "only a round can follow what the host has not seen"
        return Ticket(laps, outcome=self._mixed(plan, laps))

    @torch.inference_mode()
    def collect(self, ticket: Ticket) -> StepOutcome:
        """What a step produced; waits for it. In the order of launching."""
        if ticket.flying is None:
            assert ticket.outcome is not None
            return ticket.outcome
        assert self._rounds is not None
        with ticket.laps.time(ROUND):
            outcomes = self._rounds.collect(ticket.flying)
        return self._finished(StepOutcome(outcomes), ticket.laps)

    def _mixed(self, plan: StepPlan, laps: Laps) -> StepOutcome:
        """Any plan: the host sees the trees before they are verified, and the walks after it."""
        parts = self._parts
        drawing = [row for row in plan.rows if row.samples]
        states = [self._rows[row.request_id] for row in drawing]
        with laps.time(DRAFT):
            tree = self._propose(drawing, states, plan.shape)
        with laps.time(VERIFY):
            step = _Step.build(parts, plan, tree, states)
            hidden = parts.model.forward(step.batch, parts.context)  # [T, H]
        emitted: list[RowOutcome] = []
        path = None
        if drawing:
            with laps.time(VERIFY):
                local = parts.model.logits(hidden[step.batch.sampled], parts.context)
                logits = SpreadLogits.of(local, parts.vocab_size, parts.context.group)  # [R, V]
                result = self._verify(step, logits)
            with laps.time(COMMIT):
                result = self._commit(step, result)
                emitted = self._emit(states, step, logits, result)
            path = result.path
        with laps.time(DRAFT):
            self._extend(plan, emitted, step.on_host, hidden, path)
        return self._finished(self._report(plan, emitted, step.on_host, hidden), laps)

    def _finished(self, outcome: StepOutcome, laps: Laps) -> StepOutcome:
        proposer = self._parts.proposer
        return replace(
            outcome,
            seconds=laps.seconds,
            draft_faults=proposer.num_faults,
            draft_failed=proposer.failed,
        )

    def _turn_over(self, plan: StepPlan) -> None:
        """Forget rows that left the running set and take in those that entered it."""
        for request_id in plan.released:
            del self._rows[request_id]
            self._parts.inputs.release(request_id)
        for admission in plan.admitted:
            request = admission.request
            self._rows[request.request_id] = RowState.admit(request, admission.output_ids)
            line = self._parts.inputs.admit(request.request_id)
            self._parts.proposer.admit(line)
            if self._rounds is not None:
                self._rounds.admit(line)

    def _propose(
        self, drawing: Sequence[RowPlan], states: Sequence[RowState], shape: TreeShape
    ) -> DraftTree:
        """A tree for every row that draws."""
        tokens = torch.tensor([row.token_ids[-1] for row in drawing], dtype=torch.int64)
        if any(row.num_draft and not row.draft for row in drawing):
            tree = self._proposed(drawing, states, shape, tokens)
        else:
            tree = DraftTree.roots(tokens)
        known = [number for number, row in enumerate(drawing) if row.draft]
        if known:
            chains = DraftTree.chains(tokens[known], [drawing[number].draft for number in known])
            tree = tree.with_rows(torch.tensor(known), chains)
        return tree

    def _proposed(
        self,
        drawing: Sequence[RowPlan],
        states: Sequence[RowState],
        shape: TreeShape,
        tokens: Tensor,
    ) -> DraftTree:
        """Trees of the proposer; the root alone where the plan knows the draft."""
        inputs = self._parts.inputs
        params = [state.request.params for state in states]
        ends = [row.start + len(row.token_ids) - 1 for row in drawing]
        roots = Roots(
            lines=torch.from_numpy(inputs.lines(drawing)),
            tokens=tokens,
            positions=torch.tensor(ends),
            max_nodes=torch.tensor([1 if row.draft else 1 + row.num_draft for row in drawing]),
            block_tables=torch.from_numpy(inputs.tables(drawing)),
            temperatures=torch.tensor([effective_temperature(p) for p in params]),
            seeds=torch.from_numpy(unsigned_bits([p.seed for p in params])),
        )
        tree = self._parts.proposer.propose(roots, shape)
        context = self._parts.context
        tree = share_tree(tree, shape, context.group, context.kv.device)
        assert bool((tree.sizes <= roots.max_nodes).all()), "a tree without slots"
        return tree

    def _verify(self, step: _Step, logits: SpreadLogits) -> VerifyResult:
        """Draw the target's token at every node, then walk."""
        assert step.settings is not None
        drawn = logits.draw(self._parts.sampler, step.settings)  # [R]
        return walk(step.tree, nodes(drawn, step.batch, step.tree), self._parts.context.ops)

    def _commit(self, step: _Step, result: VerifyResult) -> VerifyResult:
        """Move the KV of accepted nodes; returns the result on the host."""
        context, batch = self._parts.context, step.batch
        slots = nodes(batch.slots[batch.sampled], batch, step.tree)
        commit(result, slots, context.kv, context.ops)
        return download(result)

    def _emit(
        self, states: Sequence[RowState], step: _Step, logits: SpreadLogits, result: VerifyResult
    ) -> list[RowOutcome]:
        """Commit the emitted tokens to the sampler's rows and attach their logprobs. `result` is on
        the host."""
        emitted = [[t for t in row if t >= 0] for row in result.emitted.tolist()]
        scores: list[tuple[TokenLogprob, ...] | None] = [None] * len(states)
        tree = step.tree_on_host
        if any(state.request.params.logprobs is not None for state in states):
            order = nodes(torch.arange(logits.num_rows), step.on_host, tree)  # [B, N]
            at = order.gather(1, result.path.clamp(min=0))
            counts = [state.request.params.logprobs for state in states]
            scores = emitted_logprobs(self._parts.sampler, logits, at, emitted, counts)
        for state, tokens in zip(states, emitted, strict=True):
            state.extend(tokens)
        drafted = (tree.sizes - 1).tolist()
        paths = [tuple(n for n in row if n > 0) for row in result.path.tolist()]
        return [
            RowOutcome(*row)
            for row in zip(map(tuple, emitted), drafted, paths, scores, strict=True)
        ]

    def _extend(
        self,
        plan: StepPlan,
        emitted: Sequence[RowOutcome],
        batch: ForwardBatch,
        hidden: Tensor,
        path: Tensor | None,
    ) -> None:
        """Hand every committed token to a proposer that keeps entries of them."""
        if self._parts.proposer.lookahead == 0:
            return
        committed = collect_committed(plan.rows, emitted, batch, path, self._parts.inputs)
        self._parts.proposer.extend(committed, hidden)

    def _report(
        self, plan: StepPlan, emitted: Sequence[RowOutcome], batch: ForwardBatch, hidden: Tensor
    ) -> StepOutcome:
        """One outcome per plan row: `emitted` holds those that sampled, in order."""
        outcomes = iter(emitted)
        rows = []
        firsts = batch.attention.cu_q.tolist()[:-1]
        for row, first in zip(plan.rows, firsts, strict=True):
            outcome = next(outcomes) if row.samples else RowOutcome()
            request = self._rows[row.request_id].request
            if request.params.prompt_logprobs is not None:
                chunk = hidden[first : first + len(row.token_ids)]
                model, size = self._parts.model, self._parts.vocab_size
                scores = prompt_logprobs(
                    row, request, chunk, model, size, self._parts.sampler, self._parts.context
                )
                outcome = replace(outcome, prompt_logprobs=scores)
            rows.append(outcome)
        return StepOutcome(tuple(rows))


def _rounds(parts: RunnerParts) -> Rounds | None:
    if parts.rounds is None or not isinstance(parts.proposer, RoundProposer):
        return None
    return Rounds(
        parts.rounds,
        parts.model,
        parts.context,
        parts.inputs,
        parts.sampler,
        parts.proposer,
        parts.vocab_size,
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """A plan and its trees, on the host and on the device."""

    on_host: ForwardBatch
    tree_on_host: DraftTree
    batch: ForwardBatch
    tree: DraftTree
    settings: DrawSettings | None  # None: nothing is drawn

    @classmethod
    def build(
        cls, parts: RunnerParts, plan: StepPlan, tree: DraftTree, states: Sequence[RowState]
    ) -> _Step:
        """One copy to the device for all of it."""
        batch = parts.inputs.build(plan, tree)
        settings = None
        if states:
            settings = draw_settings(states, tree, parts.eos_token_ids, parts.vocab_size)
        there = upload((batch, tree, settings), parts.context.kv.device)
        return cls(batch, tree, *there)


def nodes(values: Tensor, batch: ForwardBatch, tree: DraftTree) -> Tensor:
    """Values [R] of the packed nodes as [B, N]; -1 behind a tree's size."""
    spread = torch.full_like(tree.tokens, -1)
    spread[batch.tree_of_node, batch.node_of_node] = values
    return spread
