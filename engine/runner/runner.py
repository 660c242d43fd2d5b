"""Runs step plans on one rank: keeps the state of every line, launches the body of the step and
reports the outcome."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from engine.grammar.grammars import Grammars
from engine.kv.scratch import Scratch
from engine.kv.storage import KVStorage
from engine.models.interface import TargetModel
from engine.runner.forms import Sizes, StepForm
from engine.runner.graphs import DeviceSteps, HostSteps, Outputs, StepRunner
from engine.runner.inputs import InputBuilder, StepInputs, TableChanges
from engine.runner.laps import Laps
from engine.runner.line_state import LineState
from engine.runner.outcomes import OutcomeBuilder
from engine.runner.step import StepBody
from engine.sampling.lines import LineSettings, is_penalised, token_counts
from engine.speculation.costs import Padding
from engine.speculation.proposer import Proposer
from engine.step.batch import ForwardContext
from engine.step.executor import Launched, execute
from engine.step.plan import DRAFT, STEP, Admission, StepOutcome, StepPlan
from engine.step.shape import ROOT, TreeShape

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How steps run on this device."""

    exact: bool  # True on a CPU: sizes are exact, without padding
    graphs: bool = False  # capture steps of padded forms as CUDA graphs

    def padding(self, max_num_seqs: int) -> Padding:
        """How these steps are padded, for those who count their work."""
        if self.exact:
            return Padding()
        return Padding(Sizes(self.exact, max_num_seqs).rows, whole_trees=True)


@dataclass(frozen=True, slots=True)
class RunnerParts:
    """The parts of a runner."""

    model: TargetModel
    context: ForwardContext  # its KV cache has one block more than plans use: scratch
    proposer: Proposer
    vocab_size: int
    eos_token_ids: frozenset[int]
    max_num_seqs: int
    max_len: int  # positions of one sequence
    steps: StepSettings
    grammars: Grammars | None = None  # on rank 0, if requests may have them


class _Next(NamedTuple):
    """What runs steps with another proposer."""

    body: StepBody
    steps: StepRunner


class ModelRunner:
    """Implements `Executor` on one rank."""

    def __init__(self, parts: RunnerParts) -> None:
        kv = parts.context.kv
        scratch = Scratch(kv.num_blocks - 1, kv.block_size)
        self._parts = parts
        self._settings = LineSettings(parts.max_num_seqs, parts.vocab_size, parts.eos_token_ids)
        self._builder = InputBuilder(
            Sizes(parts.steps.exact, parts.max_num_seqs),
            self._settings,
            parts.max_len,
            kv.block_size,
            scratch.block,
        )
        state = LineState.allocate(
            parts.max_num_seqs, self._builder.num_columns, parts.vocab_size, scratch, kv.device
        )
        self._body = StepBody(
            model=parts.model,
            context=parts.context,
            proposer=parts.proposer,
            state=state,
            scratch=scratch,
            max_len=parts.max_len,
            vocab_size=parts.vocab_size,
            grammars=parts.grammars,
        )
        self._steps = self._step_runner(self._body)
        self._next: _Next | None = None
        self._num_faults = 0  # trees that the current head could not grow

    @property
    def kv(self) -> KVStorage:
        """The target's pages."""
        return self._parts.context.kv

    @property
    def proposer(self) -> Proposer:
        return self._body.proposer

    @torch.inference_mode()
    def draft_with(self, proposer: Proposer) -> None:
        """Use another proposer from the next step on; no step may be in flight. Of running rows it
        only gets the tokens that they commit from then on. Uses the steps that `prepare_swap` has
        captured for it."""
        following, self._next = self._next, None
        if following is None or following.body.proposer is not proposer:
            following = self._with_proposer(proposer)
        self._body, self._steps = following
        self._num_faults = 0
        proposer.admit(list(self._settings.requests))

    @torch.inference_mode()
    def prepare(self, shapes: Sequence[TreeShape]) -> None:
        """Capture the decode steps with the trees that are likely to occur; call it before the
        first plan. The largest come first, so that smaller ones can share their memory."""
        for _ in self._prepare(self._steps, shapes):
            pass

    @torch.inference_mode()
    def prepare_swap(self, proposer: Proposer, shapes: Sequence[TreeShape]) -> Iterator[None]:
        """Capture the same steps with another proposer, one with each item, before `draft_with`
        uses it. Steps with the current proposer may run between the items."""
        following = self._next = self._with_proposer(proposer)
        yield from self._prepare(following.steps, shapes)

    def _prepare(self, steps: StepRunner, shapes: Sequence[TreeShape]) -> Iterator[None]:
        if isinstance(steps, DeviceSteps) and steps.captures:
            for form in self._builder.likely_forms(dict.fromkeys((ROOT, *shapes))):
                steps.prepare(form)
                yield

    def _with_proposer(self, proposer: Proposer) -> _Next:
        context = replace(self._body.context, tap=proposer.tap)
        body = replace(self._body, proposer=proposer, context=context)
        return _Next(body, self._step_runner(body))

    def execute(self, plan: StepPlan) -> StepOutcome:
        return execute(self, plan)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        laps = Laps()
        with laps.time(DRAFT if self._parts.steps.exact else STEP):
            self._change_lines(plan)
        if not plan.rows:
            return Launched(plan, StepOutcome)
        form = self._builder.form(plan)
        changes, early = self._builder.changes(plan.rows).split(self._builder.room(form))
        self._write_early(early)
        inputs = self._builder.inputs(plan, form, changes)
        with self._timed(laps):
            outputs = self._steps.launch(inputs, form, laps)
        builder = OutcomeBuilder.of(plan.rows, self._builder, form)
        return Launched(plan, lambda: self._outcome(plan, builder, outputs, laps))

    @torch.inference_mode()
    def collect(self, launched: Launched) -> StepOutcome:
        return launched.wait()

    def _step_runner(self, body: StepBody) -> StepRunner:
        if self._parts.steps.exact:
            return HostSteps(body)
        return DeviceSteps(body, self._idle, graphs=self._parts.steps.graphs)

    def _idle(self, form: StepForm) -> StepInputs:
        return self._builder.inputs(StepPlan(), form, TableChanges([], []))

    def _change_lines(self, plan: StepPlan) -> None:
        """Release the lines of ended sequences and admit new sequences."""
        if plan.released:
            self._body.proposer.release(plan.released)
        for line in plan.released:
            self._settings.release(line)
        if plan.admitted:
            self._admit(plan)

    def _admit(self, plan: StepPlan) -> None:
        """Set up the lines of new sequences, on the host, on the device and in the proposer."""
        for admission in plan.admitted:
            self._settings.admit(admission)
            self._count_tokens(admission)
        proposer = self._body.proposer
        proposer.admit([admission.line for admission in plan.admitted])
        new_blocks = {row.line: row.new_blocks for row in plan.rows}
        for admission in plan.admitted:
            if admission.draft is not None:
                proposer.adopt(admission.line, admission.draft, new_blocks[admission.line])

    def _count_tokens(self, admission: Admission) -> None:
        """Count what a new sequence has so far, if tokens that occur are penalised."""
        request = admission.request
        if is_penalised(request.params):
            seen = token_counts(request.prompt_ids, admission.output_ids, self._parts.vocab_size)
            self._body.state.counts[admission.line].copy_(torch.from_numpy(seen))

    def _write_early(self, changes: TableChanges) -> None:
        """Write the block table entries that do not fit into the step."""
        if changes.places:
            tables = self._body.state.tables
            at = torch.tensor(changes.places).to(tables.device)
            tables.view(-1)[at] = torch.tensor(changes.blocks, dtype=tables.dtype).to(tables.device)

    def _outcome(
        self, plan: StepPlan, builder: OutcomeBuilder, outputs: Outputs, laps: Laps
    ) -> StepOutcome:
        """Wait for a step and return its outcome."""
        with self._timed(laps):
            here = outputs()
        if plan.is_drafted:
            self._count_faults(int(here.faults.sum()))
        return StepOutcome(
            rows=builder.outcomes(here),
            seconds=laps.seconds,
            draft_faults=self._num_faults,
            draft_failed=self._body.proposer.failed,
        )

    def _timed(self, laps: Laps) -> AbstractContextManager[None]:
        """Times the whole step on a GPU; on a CPU the body times its parts."""
        return nullcontext() if self._parts.steps.exact else laps.time(STEP)

    def _count_faults(self, count: int) -> None:
        if count and not self._num_faults:
            logger.warning("outputs of the draft head are not finite; not drafting there")
        self._num_faults += count
