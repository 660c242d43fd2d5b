"""Turns the outputs of a step into one outcome per row of its plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from torch import Tensor

from engine.messages import DraftNodes, TokenLogprob
from engine.runner.forms import StepForm
from engine.runner.inputs import InputBuilder
from engine.runner.step import StepOutputs
from engine.step.plan import RowOutcome, RowPlan

Entries = tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class OutcomeBuilder:
    """What rows asked for when their step was launched. It is stored because a line may belong to
    another sequence when the step ends."""

    rows: Sequence[RowPlan]
    num_top: Sequence[int]  # alternatives to emitted tokens, -1: no log-probabilities
    num_named: Sequence[int]  # tokens that are scored beside the emitted ones
    first_named: int  # the column of their scores, after those of alternatives
    num_echo_top: Sequence[int]  # alternatives to prompt tokens, -1: no log-probabilities
    echo: Sequence[Sequence[int]]  # the prompt tokens that are scored
    traced: Sequence[bool]  # whether the verified tree is wanted
    pools: Sequence[bool]  # whether hidden states are wanted

    @classmethod
    def of(cls, rows: Sequence[RowPlan], builder: InputBuilder, form: StepForm) -> OutcomeBuilder:
        lines, settings = [row.line for row in rows], builder.settings
        return cls(
            rows,
            settings.num_top[lines].tolist(),
            [len(settings.named.get(line, ())) for line in lines],
            max(form.num_top, 0),
            settings.num_echo_top[lines].tolist(),
            [builder.echo(row) for row in rows],
            [settings.requests[line].trace for line in lines],
            [bool(builder.pooled(row)) for row in rows],
        )

    def outcomes(self, outputs: StepOutputs) -> tuple[RowOutcome, ...]:
        """One outcome per row, from host outputs."""
        emitted = [tuple(t for t in row if t >= 0) for row in outputs.emitted.tolist()]
        paths = [tuple(n for n in row if n > 0) for row in outputs.path.tolist()]
        sizes = outputs.sizes.tolist()
        echo, numbers = self._echo(outputs), count()
        found = []
        for at, row in enumerate(self.rows):
            scores = next(echo)
            unsound = scores is not None and any(math.isnan(entry.logprob) for entry in scores)
            pooled = None
            if self.pools[at]:
                state = outputs.pooled[next(numbers)].numpy()
                pooled, unsound = state.tobytes(), unsound or not np.isfinite(state).all()
            if not row.samples:
                found.append(RowOutcome(prompt_logprobs=scores, unsound=unsound, pooled=pooled))
                continue
            logprobs = self._emitted(at, emitted[at], outputs)
            no_bonus = len(emitted[at]) == len(paths[at])
            nodes = _nodes(outputs, at) if self.traced[at] else None
            outcome = RowOutcome(
                emitted[at],
                sizes[at] - 1,
                paths[at],
                logprobs,
                scores,
                unsound or no_bonus,
                nodes,
                pooled,
            )
            found.append(outcome)
        return tuple(found)

    def _emitted(self, at: int, tokens: Sequence[int], outputs: StepOutputs) -> Entries | None:
        if self.num_top[at] < 0:
            return None
        parts = (outputs.logprobs[at], outputs.top_ids[at], outputs.top[at])
        first = self.first_named
        named = range(first, first + self.num_named[at])
        return _entries(tokens, parts, [*range(self.num_top[at]), *named])

    def _echo(self, outputs: StepOutputs) -> Iterator[Entries | None]:
        """Log-probabilities of prompt tokens, row by row."""
        first = 0
        for tokens, num_top in zip(self.echo, self.num_echo_top, strict=True):
            some = slice(first, first + len(tokens))
            first += len(tokens)
            parts = (
                outputs.echo_logprobs[some],
                outputs.echo_top_ids[some],
                outputs.echo_top[some],
            )
            yield None if num_top < 0 else _entries(tokens, parts, range(num_top))


def _nodes(outputs: StepOutputs, row: int) -> DraftNodes:
    used = slice(1, int(outputs.sizes[row]))
    parts = (outputs.tree_tokens[row, used], outputs.tree_parents[row, used])
    return DraftNodes(*(tuple(part.tolist()) for part in parts))


def _entries(
    tokens: Sequence[int], parts: tuple[Tensor, Tensor, Tensor], columns: Sequence[int]
) -> Entries:
    """Log-probabilities of tokens [n] and of other tokens in some `columns` [n, k], as clients get
    them."""
    chosen, top_ids, top = (part[: len(tokens)].tolist() for part in parts)
    return tuple(
        TokenLogprob(token, value, [(ids[at], values[at]) for at in columns])
        for token, value, ids, values in zip(tokens, chosen, top_ids, top, strict=True)
    )
