"""The host's side of decode rounds: which plans are one, what a round is told, what came of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kv.slots import Scratch
from engine.models.interface import TargetModel
from engine.runner.decode_round import (
    DecodeRound,
    NewestTokens,
    RoundForm,
    RoundInputs,
)
from engine.runner.graphs import LaunchedRound, RoundCache
from engine.runner.input_builder import InputBuilder
from engine.sampling.edits import is_edited
from engine.sampling.rows import RowState, effective_temperature, unsigned_bits
from engine.sampling.sampler import Sampler
from engine.speculation.proposer import Proposer, RoundProposer
from engine.step.batch import ForwardContext
from engine.step.plan import RowOutcome, RowPlan, StepPlan
from engine.step.shape import MAX_NODES, ROOT, DynamicShape, TreeShape

BLOCKS_PER_ROW = 8  # new in one round; more are sent ahead of it
FIRST_ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """How rounds are run where they are."""

    max_num_seqs: int
    graphs: bool  # captured as CUDA graphs


@dataclass(frozen=True, slots=True)
class PlannedRound:
    """A plan that is a round."""

    form: RoundForm
    lines: Ints  # [rows]
    limits: Ints  # [rows] nodes, the root included


@dataclass(frozen=True, slots=True)
class FlyingRound:
    """A plan whose round the device has been told to run, with what the host needs to know of it
    afterwards: the plan's block lists may have grown by then."""

    states: Sequence[RowState]
    planned: PlannedRound
    ends: Ints  # [rows] position behind the last that has a slot
    launched: LaunchedRound


def row_counts(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of rows that rounds are made for; others are padded to the next."""
    return (*(n for n in FIRST_ROWS if n < max_num_seqs), max_num_seqs)


class Rounds:
    """Runs decode rounds for a model runner. Rows with penalties, bias, `min_tokens` still to come
    or log-probabilities are left to it, and so are prompts."""

    def __init__(
        self,
        settings: RoundSettings,
        model: TargetModel,
        context: ForwardContext,
        inputs: InputBuilder,
        sampler: Sampler,
        proposer: Proposer,
        vocab_size: int,
    ) -> None:
        assert isinstance(proposer, RoundProposer)
        page = context.kv.keys[0]
        self._scratch = Scratch(page.shape[0] - 1, page.shape[1])
        columns = -(-(inputs.max_len + MAX_NODES) // page.shape[1])
        self._final = np.zeros(settings.max_num_seqs, dtype=np.int64)  # columns that are sent
        self._inputs = inputs
        self._proposer = proposer
        self._vocab_size = vocab_size
        self._row_counts = row_counts(settings.max_num_seqs)
        tables = torch.full(
            (settings.max_num_seqs + 1, columns), self._scratch.block, dtype=torch.int32
        )
        body = DecodeRound(
            model=model,
            context=context,
            sampler=sampler,
            proposer=proposer,
            tables=tables.to(page.device),
            newest=NewestTokens.on(page.device, settings.max_num_seqs),
            scratch=self._scratch,
            max_len=inputs.max_len,
            vocab_size=vocab_size,
        )
        self._tables = body.tables
        self._cache = RoundCache(body, graphs=settings.graphs)

    def admit(self, line: int) -> None:
        """Another sequence takes this line."""
        self._final[line] = 0

    def plan(self, plan: StepPlan, states: Sequence[RowState]) -> PlannedRound | None:
        """The round that carries out this plan; None if none does. `states`: of its rows."""
        plain = all(row.samples and len(row.token_ids) == 1 and not row.draft for row in plan.rows)
        if not plain or self._proposer.failed or any(map(_wants_more, states)):
            return None
        lines = self._inputs.lines(plan.rows)
        limits = self._limits(plan, lines)
        shape = _shape(plan, limits)
        if shape is None:
            return None
        params = [state.request.params for state in states]
        sampled = [p for p in params if effective_temperature(p) > 0]
        form = RoundForm(
            num_rows=next(n for n in self._row_counts if n >= len(plan.rows)),
            shape=shape,
            any_sampled=bool(sampled) or self._cache.graphs,  # fewer graphs, and they cost no more
            is_filtered=any(p.top_k or p.top_p < 1 or p.min_p > 0 for p in sampled),
        )
        return PlannedRound(form, lines, np.minimum(limits, shape.num_nodes))

    def prepare(self, shapes: Sequence[TreeShape]) -> None:
        """Capture the graphs of these trees, if there are graphs; the others come when asked for.
        The largest come first, so that the smaller find memory to share."""
        if not self._cache.graphs:
            return
        for num_rows in reversed(self._row_counts):
            for shape in dict.fromkeys((ROOT, *shapes)):
                for is_filtered in (False, True):
                    form = RoundForm(num_rows, shape, any_sampled=True, is_filtered=is_filtered)
                    self._cache.get(form, functools.partial(self._idle, form))

    def _limits(self, plan: StepPlan, lines: Ints) -> Ints:
        """Nodes of each row, the root included."""
        rows = plan.rows
        limits = np.array([1 + row.num_draft for row in rows], dtype=np.int64)
        if not (limits > 1).any():
            return limits
        self._proposer.settle()  # what was put off makes states known
        starts = np.array([row.start for row in rows], dtype=np.int64)
        if plan.ahead:  # a round that begins with a known state ends with one
            starts -= 1
        return np.where(self._proposer.knows(lines, starts), limits, 1)

    def launch(
        self, plan: StepPlan, states: Sequence[RowState], planned: PlannedRound
    ) -> FlyingRound:
        """Begin to carry out a plan, as was planned just before. A plan that is ahead follows the
        round that was launched last, which need not be collected yet."""
        self._proposer.settle()
        form = planned.form
        inputs = self._padded(form, plan, states, planned.lines, planned.limits)
        launched = self._cache.get(form, functools.partial(self._idle, form)).launch(inputs)
        return FlyingRound(states, planned, self._ends(plan.rows), launched)

    def _idle(self, form: RoundForm) -> RoundInputs:
        return self._padded(form, StepPlan(), [], np.empty(0, np.int64), np.empty(0, np.int64))

    def collect(self, flying: FlyingRound) -> tuple[RowOutcome, ...]:
        """Wait for a round, in the order of launching; tells the row states."""
        states, planned, outputs = flying.states, flying.planned, flying.launched.wait()
        count, limits = len(states), planned.limits
        sound = outputs.sound[:count].numpy()
        self._proposer.count_faults(int(((limits > 1) & ~sound).sum()))
        newest = outputs.newest[:count].numpy()
        self._proposer.absorbed(planned.lines, np.minimum(newest, flying.ends - 1))
        outcomes = []
        drafted = np.where(sound, limits - 1, 0).tolist()
        found = (outputs.emitted[:count].tolist(), outputs.path[:count].tolist(), drafted)
        for state, emitted, path, num_draft in zip(states, *found, strict=True):
            tokens = tuple(token for token in emitted if token >= 0)
            state.extend(tokens)
            nodes = tuple(node for node in path if node > 0)
            outcomes.append(RowOutcome(tokens, num_draft, nodes))
        return tuple(outcomes)

    def _ends(self, rows: Sequence[RowPlan]) -> Ints:
        slots = np.array([len(row.block_ids) for row in rows], np.int64) * self._inputs.block_size
        return np.minimum(slots, self._inputs.max_len)

    def _padded(
        self,
        form: RoundForm,
        plan: StepPlan,
        states: Sequence[RowState],
        lines: Ints,
        limits: Ints,
    ) -> RoundInputs:
        """Inputs of the host, with rows that are none behind those of `plan`."""
        rows = plan.rows
        missing = form.num_rows - len(rows)
        params = [state.request.params for state in states]

        def integers(values: Ints | Sequence[int], behind: int = 0) -> torch.Tensor:
            padding = np.full(missing, behind, dtype=np.int64)
            return torch.from_numpy(np.concatenate((np.array(values, dtype=np.int64), padding)))

        def floats(values: Sequence[float], behind: float = 0.0) -> torch.Tensor:
            return torch.tensor([*values, *[behind] * missing], dtype=torch.float32)

        places, blocks = self._new_blocks(rows, lines, form.num_rows * BLOCKS_PER_ROW)
        whole = self._vocab_size
        return RoundInputs(
            lines=integers(lines, self._tables.shape[0] - 1),
            follows=torch.tensor([*[plan.ahead] * len(rows), *[False] * missing]),
            tokens=integers([row.token_ids[-1] for row in rows]),
            positions=integers([row.start for row in rows]),
            max_nodes=integers(limits),
            ends=integers(self._ends(rows)),
            seeds=integers(unsigned_bits([p.seed for p in params])),
            top_k=integers([min(p.top_k or whole, whole) for p in params], whole),
            temperatures=floats([effective_temperature(p) for p in params]),
            top_p=floats([p.top_p for p in params], 1.0),
            min_p=floats([p.min_p for p in params]),
            table_places=torch.from_numpy(places),
            table_blocks=torch.from_numpy(blocks),
        )

    def _new_blocks(
        self, rows: Sequence[RowPlan], lines: Ints, room: int
    ) -> tuple[Ints, NDArray[np.int32]]:
        """Where the block tables on the device change, [room] each: a row's blocks up to its root
        are final once sent. What finds no room here is sent at once."""
        places: list[int] = []
        blocks: list[int] = []
        columns = self._tables.shape[1]
        for row, line in zip(rows, lines.tolist(), strict=True):
            now = row.start // self._inputs.block_size
            first = min(int(self._final[line]), now)
            self._final[line] = now
            places += range(line * columns + first, line * columns + len(row.block_ids))
            blocks += row.block_ids[first:]
        if len(places) > room:
            self._send(places[room:], blocks[room:])
            del places[room:], blocks[room:]
        missing = room - len(places)
        places += [self._tables.numel() - 1] * missing
        blocks += [self._scratch.block] * missing
        return np.array(places, dtype=np.int64), np.array(blocks, dtype=np.int32)

    def _send(self, places: Sequence[int], blocks: Sequence[int]) -> None:
        device = self._tables.device
        at = torch.tensor(places).to(device)
        self._tables.view(-1)[at] = torch.tensor(blocks, dtype=torch.int32).to(device)


def _shape(plan: StepPlan, limits: Ints) -> TreeShape | None:
    """That of the plan if some row drafts, and if it can be cut for those that may less."""
    drafting = limits[limits > 1]
    if len(drafting) == 0:
        return ROOT
    if isinstance(plan.shape, DynamicShape) and (drafting < plan.shape.num_nodes).any():
        return None
    return plan.shape


def _wants_more(state: RowState) -> bool:
    """Whether a round lacks something that this row asks for."""
    params = state.request.params
    return is_edited(state) or params.logprobs is not None or params.prompt_logprobs is not None
