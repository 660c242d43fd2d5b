"""Turns a step plan (host integers) into the form of the step and its inputs (host tensors)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.runner.forms import Sizes, StepForm, row_counts
from engine.sampling.lines import BiasList, LineSettings
from engine.step.plan import RowPlan, StepPlan
from engine.step.shape import MAX_NODES, ROOT, TreeShape

BLOCKS_PER_ROW = 8  # room for new blocks in a padded step; further ones are written before it
NOTHING = torch.empty(0, dtype=torch.int64)  # stands for inputs that the form lacks


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All inputs of a step with B rows. A padding row has limit 0 and no token."""

    lines: Tensor  # [B] int64, the last line for padding rows
    follows: Tensor  # [B] bool: the root comes from the previous step, see `LineState`
    starts: Tensor  # [B] int64, position of the first own token
    lens: Tensor  # [B] int64, own tokens
    own_tokens: Tensor  # [P] int64, row after row
    samples: Tensor  # [B] bool
    next_tokens: Tensor  # [B] int64, of rows that do not sample
    limits: Tensor  # [B] int64 nodes, the root included
    ends: Tensor  # [B] int64, position after the last one with a slot
    known: Tensor  # [B, K] int64 tokens of drafts that are in the plan
    num_known: Tensor  # [B] int64
    seeds: Tensor  # [B] int64
    top_k: Tensor  # [B] int64, vocabulary size when off
    temperatures: Tensor  # [B] float32, as are the next five
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    bias_ids: Tensor  # [B, M] int64, -1: no entry; see `BiasEntries`
    bias_values: Tensor  # [B, M] float32
    bias_until: Tensor  # [B, M] int64
    scored: Tensor  # [B] bool: log-probabilities of emitted tokens are wanted
    named_ids: Tensor  # [B, L] int64 tokens whose log-probabilities are wanted, too; 0: no entry
    echo_rows: Tensor  # [S] int64 row of each prompt token that is scored
    echo_places: Tensor  # [S] int64, index of the row's own token that predicts it
    echo_tokens: Tensor  # [S] int64
    pool_rows: Tensor  # int64 row of each token whose hidden state is wanted
    pool_places: Tensor  # the same length, index of the row's own token
    pool_numbers: Tensor  # the same length, to which of G sums it is added; G for padding
    table_places: Tensor  # [U] int64, indices of new entries in the flat block tables
    table_blocks: Tensor  # [U] int32, their blocks


class TableChanges(NamedTuple):
    """New entries of the flat block tables of all lines."""

    places: list[int]
    blocks: list[int]

    def split(self, room: int | None) -> tuple[TableChanges, TableChanges]:
        """The first `room` entries, and the others."""
        some, others = slice(None, room), slice(len(self.places) if room is None else room, None)
        return (
            TableChanges(self.places[some], self.blocks[some]),
            TableChanges(self.places[others], self.blocks[others]),
        )


class _PackedSizes(NamedTuple):
    """The sizes of a `StepForm`."""

    num_rows: int
    num_own: int
    num_tokens: int
    num_nodes: int
    num_columns: int
    only_roots: bool
    num_known: int


class _LineFacts(NamedTuple):
    """What the settings say of the rows of a step: the same until lines change hands."""

    lines: Tensor  # [B] int64, padding included
    ints: Tensor  # [2, B] as `LineSettings.ints`; each part is contiguous, as kernels need it
    floats: Tensor  # [6, B]
    draws: bool
    any_sampled: bool
    any_greedy: bool
    is_filtered: bool
    is_penalised: bool
    is_masked: bool
    num_top: int  # most alternatives that a row wants, -1: none wants log-probabilities
    num_echo_top: int


@dataclass(frozen=True, slots=True)
class InputBuilder:
    """Turns plans into forms and inputs."""

    sizes: Sizes
    settings: LineSettings
    max_len: int  # positions of one sequence
    block_size: int
    scratch_block: int
    _latest: dict[tuple[Any, ...], _LineFacts] = field(default_factory=dict, compare=False)

    @property
    def num_columns(self) -> int:
        """Columns of the block tables: for every position, and for a tree's nodes at the last."""
        return -(-(self.max_len + MAX_NODES) // self.block_size)

    def form(self, plan: StepPlan) -> StepForm:
        """The form of the step that runs this plan."""
        rows, sizes = plan.rows, self.sizes
        shape = self._shape(plan)
        packed, known = self._packed(rows, shape), self._line_facts(rows)
        echo = [len(self.echo(row)) for row in rows]
        bias = [sum(map(len, self._bias(row))) for row in rows if row.samples]
        pooled = [len(places) for row in rows if (places := self.pooled(row))]
        return StepForm(
            exact=sizes.exact,
            follows=plan.ahead or not sizes.exact,
            **packed._asdict(),
            shape=shape,
            draws=known.draws,
            any_sampled=not sizes.exact or known.any_sampled,  # fewer graphs cost no more
            any_greedy=not sizes.exact or known.any_greedy,
            is_filtered=known.is_filtered,
            is_penalised=known.is_penalised,
            is_masked=known.is_masked,
            num_bias=sizes.entries(max(bias, default=0)),
            num_top=self._num_top(known.num_top),
            num_named=sizes.entries(max(map(len, self._named(rows)), default=0)),
            num_echo=sizes.entries(sum(echo)),
            num_echo_top=self._num_top(known.num_echo_top),
            num_pooled=sizes.entries(sum(pooled)),
            num_pools=sizes.entries(len(pooled)),
        )

    def inputs(self, plan: StepPlan, form: StepForm, changes: TableChanges) -> StepInputs:
        """Host inputs, with padding rows after the rows of `plan`. `changes` of the block tables
        must fit into the form's room."""
        rows, known = plan.rows, self._line_facts(plan.rows, form.num_rows)
        of_rows = np.zeros((8, form.num_rows), dtype=np.int64)
        if rows:  # numpy takes a few numbers faster than torch
            of_rows[:, : len(rows)] = np.array([self._row_integers(row) for row in rows]).T
        integers = torch.from_numpy(of_rows).unbind()
        starts, lens, samples, next_tokens, limits, ends, num_known, scored = integers
        seeds, top_k = known.ints.unbind()
        temperatures, min_p, frequency, presence, top_p, repetition = known.floats.unbind()
        places, blocks = self._padded_changes(changes, form)
        return StepInputs(
            lines=known.lines,
            follows=limits > 0 if plan.ahead else torch.zeros(form.num_rows, dtype=torch.bool),
            starts=starts,
            lens=lens,
            own_tokens=self._own_tokens(rows, form),
            samples=samples.bool(),
            next_tokens=next_tokens,
            limits=limits,
            ends=ends,
            known=_matrix([row.draft for row in rows], form.num_rows, form.num_known, 0),
            num_known=num_known,
            seeds=seeds,
            top_k=top_k,
            temperatures=temperatures,
            top_p=top_p,
            min_p=min_p,
            repetition=repetition,
            frequency=frequency,
            presence=presence,
            **self._bias_inputs(rows, form),
            scored=scored.bool(),
            named_ids=_matrix(self._named(rows), form.num_rows, form.num_named, 0),
            **self._echo_inputs(rows, form),
            **self._pool_inputs(rows, form),
            table_places=_integers(places),
            table_blocks=_integers(blocks).int(),
        )

    def _row_integers(self, row: RowPlan) -> tuple[int, ...]:
        """A row's integers, in the order in which `inputs` unpacks them."""
        return (
            row.start,
            len(row.token_ids),
            int(row.samples),
            row.next_token,
            1 + row.num_draft,
            min(row.num_blocks * self.block_size, self.max_len),
            len(row.draft),
            int(self.settings.num_top[row.line] >= 0),
        )

    def _line_facts(self, rows: Sequence[RowPlan], num_rows: int | None = None) -> _LineFacts:
        """`num_rows`: with padding."""
        num_rows = self.sizes.rows(len(rows)) if num_rows is None else num_rows
        samples = tuple((row.line, row.samples) for row in rows)
        key = (samples, num_rows, self.settings.num_changes)
        if key not in self._latest:
            self._latest.clear()
            self._latest[key] = self._read_lines(samples, num_rows)
        return self._latest[key]

    def _read_lines(self, samples: Sequence[tuple[int, bool]], num_rows: int) -> _LineFacts:
        """`samples`: the lines, and whether each draws a token."""
        settings = self.settings
        padding = [len(settings.seeds) - 1] * (num_rows - len(samples))
        lines = np.array([*(line for line, _ in samples), *padding], dtype=np.int64)
        drawing = [line for line, draws in samples if draws]
        sampled = settings.temperatures[drawing] > 0
        # `take` keeps each parameter contiguous; indexing would not.
        return _LineFacts(
            lines=torch.from_numpy(lines),
            ints=torch.from_numpy(settings.ints.take(lines, axis=1)),
            floats=torch.from_numpy(settings.floats.take(lines, axis=1)),
            draws=bool(drawing),
            any_sampled=bool(sampled.any()),
            any_greedy=not sampled.all(),
            is_filtered=bool(settings.is_filtered[drawing].any()),
            is_penalised=bool(settings.is_penalised[drawing].any()),
            is_masked=bool(settings.is_masked[drawing].any()),
            num_top=int(settings.num_top[drawing].max(initial=-1)),
            num_echo_top=int(settings.num_echo_top[lines[: len(samples)]].max(initial=-1)),
        )

    def likely_forms(self, shapes: Iterable[TreeShape]) -> Iterator[StepForm]:
        """Forms of decode steps with these trees, for every number of rows, with and without
        filters, the largest first."""
        for num_rows in reversed(row_counts(self.sizes.max_num_seqs)):
            for shape in shapes:
                for is_filtered in (False, True):
                    yield self._decode_form(num_rows, shape, is_filtered)

    def _decode_form(self, num_rows: int, shape: TreeShape, is_filtered: bool) -> StepForm:
        """Form of a step in which every row has its root and a tree of `shape`."""
        return StepForm(
            exact=False,
            follows=True,
            num_rows=num_rows,
            num_own=num_rows,
            num_tokens=num_rows * shape.num_nodes,
            num_nodes=num_rows * shape.num_nodes,
            num_columns=self.num_columns,
            only_roots=True,
            num_known=0,
            shape=shape,
            draws=True,
            any_sampled=True,
            any_greedy=True,
            is_filtered=is_filtered,
            is_penalised=False,
            is_masked=False,
            num_bias=0,
            num_top=-1,
            num_named=0,
            num_echo=0,
            num_echo_top=-1,
            num_pooled=0,
            num_pools=0,
        )

    def _shape(self, plan: StepPlan) -> TreeShape:
        """Shape of the proposer's trees, cut to the largest row limit if sizes are exact."""
        limits = [1 + row.num_draft for row in plan.rows if row.is_drafted]
        if not limits:
            return ROOT
        return plan.shape.first(max(limits)) if self.sizes.exact else plan.shape

    def _packed(self, rows: Sequence[RowPlan], shape: TreeShape) -> _PackedSizes:
        sizes, num_rows = self.sizes, self.sizes.rows(len(rows))
        num_known = sizes.entries(max((len(row.draft) for row in rows), default=0))
        only_roots = all(len(row.token_ids) == 1 for row in rows)
        own = sum(len(row.token_ids) for row in rows)
        nodes = len(rows) + sum(row.num_draft for row in rows)
        dense = num_rows * shape.num_nodes
        uniform = only_roots and num_known == 0
        most_blocks = max((row.num_blocks for row in rows), default=1)
        return _PackedSizes(
            num_rows=num_rows,
            num_own=num_rows if only_roots else sizes.tokens(own),
            num_tokens=dense if uniform else sizes.tokens(own + nodes - len(rows)),
            num_nodes=dense if uniform else sizes.tokens(nodes),
            num_columns=most_blocks if sizes.exact else self.num_columns,
            only_roots=only_roots,
            num_known=num_known,
        )

    def _num_top(self, most: int) -> int:
        return most if most < 0 else self.sizes.entries(most)

    def _own_tokens(self, rows: Sequence[RowPlan], form: StepForm) -> Tensor:
        """The rows' own tokens. A token that is not known yet is 0 here: the previous step leaves
        it on the device."""
        found = [max(token, 0) for row in rows for token in row.token_ids]
        return _integers(found + [0] * (form.num_own - len(found)))

    def _named(self, rows: Sequence[RowPlan]) -> Sequence[Sequence[int]]:
        """The tokens that each row wants to be scored beside the emitted ones."""
        return [self.settings.named.get(row.line, ()) if row.samples else () for row in rows]

    def _bias(self, row: RowPlan) -> list[BiasList]:
        return self.settings.bias(row.line, row.start + len(row.token_ids))

    def _bias_inputs(self, rows: Sequence[RowPlan], form: StepForm) -> dict[str, Tensor]:
        names = ("bias_ids", "bias_values", "bias_until")
        if form.num_bias == 0:
            return dict.fromkeys(names, NOTHING)
        lists = [self._bias(row) if row.samples else [] for row in rows]

        def matrix(name: str, unused: int, dtype: Any = np.int64) -> Tensor:
            parts = [[x for part in found for x in getattr(part, name)] for found in lists]
            return _matrix(parts, form.num_rows, form.num_bias, unused, dtype)

        found = matrix("ids", -1), matrix("values", 0, np.float32), matrix("until", 0)
        return dict(zip(names, found, strict=True))

    def echo(self, row: RowPlan) -> Sequence[int]:
        """The prompt tokens that this row's chunk predicts, if the request wants them scored."""
        if self.settings.num_echo_top[row.line] < 0:
            return ()
        prompt = self.settings.requests[row.line].prompt_ids
        return prompt[row.start + 1 : row.start + 1 + len(row.token_ids)]

    def _echo_inputs(self, rows: Sequence[RowPlan], form: StepForm) -> dict[str, Tensor]:
        names = ("echo_rows", "echo_places", "echo_tokens")
        if form.num_echo == 0:
            return dict.fromkeys(names, NOTHING)
        found = [self.echo(row) for row in rows]
        numbers = [[row] * len(tokens) for row, tokens in enumerate(found)]
        places = [range(len(tokens)) for tokens in found]

        def padded(parts: Sequence[Sequence[int]]) -> Tensor:
            values = list(chain.from_iterable(parts))
            return _integers(values + [0] * (form.num_echo - len(values)))

        return dict(zip(names, (padded(numbers), padded(places), padded(found)), strict=True))

    def pooled(self, row: RowPlan) -> range:
        """Which of this row's own tokens have a hidden state that the request wants."""
        kind, length = self.settings.pooling.get(row.line), len(row.token_ids)
        if kind is None or (kind == "last" and not row.samples):
            return range(0)
        return range(length - 1 if kind == "last" else 0, length)

    def _pool_inputs(self, rows: Sequence[RowPlan], form: StepForm) -> dict[str, Tensor]:
        names = ("pool_rows", "pool_places", "pool_numbers")
        if form.num_pooled == 0:
            return dict.fromkeys(names, NOTHING)
        found = [(row, places) for row, plan in enumerate(rows) if (places := self.pooled(plan))]
        values = np.zeros((3, form.num_pooled), dtype=np.int64)
        values[2] = form.num_pools
        first = 0
        for number, (row, places) in enumerate(found):
            some = slice(first, first + len(places))
            values[0, some], values[1, some], values[2, some] = row, places, number
            first += len(places)
        return dict(zip(names, torch.from_numpy(values).unbind(), strict=True))

    def changes(self, rows: Sequence[RowPlan]) -> TableChanges:
        """The new entries of the block tables."""
        places: list[int] = []
        blocks: list[int] = []
        for row in rows:
            first = row.line * self.num_columns + row.first_block
            places += range(first, first + len(row.new_blocks))
            blocks += row.new_blocks
        return TableChanges(places, blocks)

    def room(self, form: StepForm) -> int | None:
        """How many block table changes fit into a step of this form; None: any number."""
        if form.exact:
            return None
        return form.num_rows * BLOCKS_PER_ROW + form.num_own // self.block_size

    def _padded_changes(self, changes: TableChanges, form: StepForm) -> TableChanges:
        """Fill the form's room by writing the scratch block to the padding line's table again."""
        missing = (self.room(form) or len(changes.places)) - len(changes.places)
        last = len(self.settings.seeds) * self.num_columns - 1
        return TableChanges(
            changes.places + [last] * missing, changes.blocks + [self.scratch_block] * missing
        )


def _matrix(
    parts: Sequence[Sequence[Any]], num_rows: int, width: int, unused: int, dtype: Any = np.int64
) -> Tensor:
    """[num_rows, width], each part padded with `unused`."""
    if width == 0:
        return NOTHING
    values = np.full((num_rows, width), unused, dtype=dtype)
    for row, part in enumerate(parts):
        values[row, : len(part)] = part
    return torch.from_numpy(values)


def _integers(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64)) if values else NOTHING
