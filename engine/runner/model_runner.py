"""Runs step plans on a device: build inputs, forward, verify, extend, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.messages import TokenLogprob
from engine.models.interface import TargetModel
from engine.runner.forward import ForwardContext
from engine.runner.input_builder import InputBuilder
from engine.runner.logprobs import emitted_logprobs, prompt_logprobs
from engine.sampling.batch import RowState, build_sampling_batch
from engine.sampling.sampler import Sampler
from engine.scheduler.plan import RowOutcome, StepOutcome, StepPlan
from engine.spec.proposer import Proposer
from engine.spec.tree import VerifyResult
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

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutcome:
        self._turn_over(plan)
        if not plan.rows:
            return StepOutcome()
        parts = self._parts
        batch = parts.inputs.build(plan)
        tree = parts.proposer.propose(batch.token_ids[batch.sampled])
        hidden = parts.model.forward(batch, parts.context)  # [T, H]
        emitted: list[RowOutcome] = []
        result = None
        if len(batch.sampled):
            logits = parts.model.logits(hidden[batch.sampled], parts.context)  # [R, V]
            states = [self._rows[row.request_id] for row in plan.rows if row.samples]
            sampling = build_sampling_batch(states, parts.eos_token_ids, parts.vocab_size)
            drawn = parts.sampler.draw(logits, sampling)  # [R], R = B * N
            result = walk(tree, drawn.view(tree.tokens.shape))
            emitted = self._emit(states, logits, result)
        parts.proposer.extend(batch, hidden, result)
        return self._report(plan, emitted, hidden)

    def _turn_over(self, plan: StepPlan) -> None:
        """Forget rows that left the running set and take in those that entered it."""
        for request_id in plan.released:
            del self._rows[request_id]
            self._parts.inputs.release(request_id)
        for admission in plan.admitted:
            request = admission.request
            self._rows[request.request_id] = RowState.admit(request, admission.output_ids)
            self._parts.inputs.admit(request.request_id)

    def _emit(
        self, states: Sequence[RowState], logits: Tensor, result: VerifyResult
    ) -> list[RowOutcome]:
        """Commit the emitted tokens to the sampler's rows and attach their logprobs."""
        counts = [state.request.params.logprobs for state in states]
        entries = emitted_logprobs(self._parts.sampler, logits, result.emitted[:, 0], counts)
        outcomes = []
        for state, row, entry in zip(states, result.emitted.tolist(), entries, strict=True):
            tokens = tuple(token for token in row if token >= 0)
            state.extend(tokens)
            outcomes.append(RowOutcome(tokens, None if entry is None else (entry,)))
        return outcomes

    def _report(self, plan: StepPlan, emitted: Sequence[RowOutcome], hidden: Tensor) -> StepOutcome:
        """One outcome per plan row: `emitted` holds those that sampled, in order."""
        outcomes = iter(emitted)
        rows = []
        first = 0
        for row in plan.rows:
            outcome = next(outcomes) if row.samples else RowOutcome()
            request = self._rows[row.request_id].request
            if request.params.prompt_logprobs is not None:
                chunk = hidden[first : first + len(row.token_ids)]
                scores: tuple[TokenLogprob, ...] = prompt_logprobs(
                    row, request, chunk, self._parts.model, self._parts.sampler, self._parts.context
                )
                outcome = RowOutcome(outcome.emitted, outcome.logprobs, scores)
            rows.append(outcome)
            first += len(row.token_ids)
        return StepOutcome(tuple(rows))
