"""Runs step plans on a device: propose, forward, verify, commit, extend, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.messages import TokenLogprob
from engine.models.interface import TargetModel
from engine.parallel.spread import SpreadLogits
from engine.parallel.trees import share_tree
from engine.runner.committed import collect_committed
from engine.runner.forward import ForwardBatch, ForwardContext
from engine.runner.input_builder import InputBuilder
from engine.runner.laps import COMMIT, DRAFT, VERIFY, Laps
from engine.runner.logprobs import emitted_logprobs, prompt_logprobs
from engine.sampling.batch import RowState, build_sampling_batch, effective_temperature
from engine.sampling.sampler import Sampler
from engine.scheduler.plan import RowOutcome, RowPlan, StepOutcome, StepPlan
from engine.spec.commit import commit
from engine.spec.proposer import Proposer, Roots
from engine.spec.shape import TreeShape
from engine.spec.tree import DraftTree, VerifyResult
from engine.spec.verify import walk


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


class ModelRunner:
    """Executes plans. Keeps per running sequence only what the sampler and the inputs need."""

    def __init__(self, parts: RunnerParts) -> None:
        self._parts = parts
        self._rows: dict[str, RowState] = {}

    def draft_with(self, proposer: Proposer) -> None:
        """Take trees from another proposer from the next step on. It knows nothing about running
        rows but what they commit from then on."""
        context = replace(self._parts.context, tap=proposer.tap)
        self._parts = replace(self._parts, proposer=proposer, context=context)
        for request_id in self._rows:
            proposer.admit(self._parts.inputs.line(request_id))

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutcome:
        parts, laps = self._parts, Laps()
        with laps.time(DRAFT):
            if plan.released or plan.admitted:
                parts.proposer.settle()
        self._turn_over(plan)
        if not plan.rows:
            return StepOutcome()
        drawing = [row for row in plan.rows if row.samples]
        states = [self._rows[row.request_id] for row in drawing]
        with laps.time(DRAFT):
            tree = self._propose(drawing, states, plan.shape)
        with laps.time(VERIFY):
            batch = parts.inputs.build(plan, tree)
            hidden = parts.model.forward(batch, parts.context)  # [T, H]
        emitted: list[RowOutcome] = []
        path = None
        if drawing:
            with laps.time(VERIFY):
                local = parts.model.logits(hidden[batch.sampled], parts.context)
                logits = SpreadLogits.of(local, parts.vocab_size, parts.context.group)  # [R, V]
                result = self._verify(states, tree, batch, logits)
            with laps.time(COMMIT):
                slots = nodes(batch.slots[batch.sampled], batch, tree)
                commit(result, slots, parts.context.kv, parts.context.ops)
                emitted = self._emit(states, tree, batch, logits, result)
            path = result.path
        with laps.time(DRAFT):
            self._extend(plan, emitted, batch, hidden, path)
        return replace(
            self._report(plan, emitted, batch, hidden),
            seconds=laps.seconds,
            draft_faults=parts.proposer.num_faults,
            draft_failed=parts.proposer.failed,
        )

    def _turn_over(self, plan: StepPlan) -> None:
        """Forget rows that left the running set and take in those that entered it."""
        for request_id in plan.released:
            del self._rows[request_id]
            self._parts.inputs.release(request_id)
        for admission in plan.admitted:
            request = admission.request
            self._rows[request.request_id] = RowState.admit(request, admission.output_ids)
            self._parts.proposer.admit(self._parts.inputs.admit(request.request_id))

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
        seeds = np.array([p.seed for p in params], dtype=np.uint64).view(np.int64)
        ends = [row.start + len(row.token_ids) - 1 for row in drawing]
        roots = Roots(
            lines=inputs.to_device(inputs.lines(drawing)),
            tokens=tokens,
            positions=torch.tensor(ends),
            max_nodes=torch.tensor([1 if row.draft else 1 + row.num_draft for row in drawing]),
            block_tables=inputs.to_device(inputs.tables(drawing)),
            temperatures=torch.tensor([effective_temperature(p) for p in params]),
            seeds=inputs.to_device(seeds),
        )
        tree = self._parts.proposer.propose(roots, shape)
        tree = share_tree(tree, shape, self._parts.context.group)
        assert bool((tree.sizes <= roots.max_nodes).all()), "a tree without slots"
        return tree

    def _verify(
        self, states: Sequence[RowState], tree: DraftTree, batch: ForwardBatch, logits: SpreadLogits
    ) -> VerifyResult:
        """Draw the target's token at every node, then walk."""
        parts = self._parts
        sampling = build_sampling_batch(states, tree, parts.eos_token_ids, parts.vocab_size)
        drawn = logits.draw(parts.sampler, sampling)  # [R]
        return walk(tree, nodes(drawn, batch, tree))

    def _emit(
        self,
        states: Sequence[RowState],
        tree: DraftTree,
        batch: ForwardBatch,
        logits: SpreadLogits,
        result: VerifyResult,
    ) -> list[RowOutcome]:
        """Commit the emitted tokens to the sampler's rows and attach their logprobs."""
        emitted = [[t for t in row if t >= 0] for row in result.emitted.tolist()]
        scores: list[tuple[TokenLogprob, ...] | None] = [None] * len(states)
        if any(state.request.params.logprobs is not None for state in states):
            order = nodes(torch.arange(logits.num_rows), batch, tree)  # [B, N]
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


def nodes(values: Tensor, batch: ForwardBatch, tree: DraftTree) -> Tensor:
    """Values [R] of the packed nodes as [B, N]; -1 behind a tree's size."""
    spread = torch.full_like(tree.tokens, -1)
    spread[batch.tree_of_node, batch.node_of_node] = values
    return spread
