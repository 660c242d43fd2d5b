"""What a decode step costs by its work: a linear model that learns from every step.

seconds = scale * (base + slope * tokens + row * rows + context * cached tokens
                   + trees, if a row has more than its root
                   + start of the head + passes * (its base + its slope * drafting)
                   + late * late tokens)

with a deviation from each line at some numbers. A machine that gets slower as a whole moves
`scale`; only what remains changes the parts. So costs of work that was not done lately stay
comparable with the others.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from engine.step.plan import DRAFT, VERIFY, StepOutcome, StepPlan
from engine.step.shape import StaticShape, TreeShape

# With a ninth row, a CPU's kernels unpack quantised weights twice.
KNOTS = (1, 2, 4, 8, 9, *(1 << power for power in range(4, 12)))
BASE, SLOPE, ROW, CONTEXT, HEAD_BASE, HEAD_SLOPE, HEAD_START, LATE, TREES = LINES = tuple(range(9))
TOKENS, HEAD = len(LINES), len(LINES) + len(KNOTS)  # the first deviation of either line
# Of each line, relative to a step of one token: a guess, and how far it may be off.
GUESSES = (
    (0.9, 0.5),
    (0.05, 0.1),
    (0.01, 0.05),
    (1e-6, 1e-4),
    (0.1, 0.1),
    (0.02, 0.05),
    (0.1, 0.1),
    (0.015, 0.02),
    (0.05, 0.1),
)
BENT = 0.1  # relative deviation that a line may have
NOISE = 0.1  # relative, of one step
DRIFT = 0.007  # relative change of a part from step to step
COMMON = 0.1  # share of a step's relative error that all parts have in common
MOST_OF_HEAD = 0.9  # largest share of the head in a step
LEAST = 0.01  # of the base: no step is predicted to take less
FITS = 5  # times that the first samples are gone through
SURPRISE = 1.35  # no step counts as further from the prediction than this factor

Parts = tuple[tuple[int, float], ...]  # parts of the model with their weights


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a decode step, padding included."""

    rows: int
    tokens: int  # roots and draft nodes
    drafting: int = 0  # nodes in a pass of the head, of all rows
    passes: int = 0  # of the head
    context: int = 0  # cached tokens of all rows
    late: int = 0  # tokens that the head takes first, of rows that did not draft of late

    def verified(self) -> Parts:
        """What the target does."""
        lines = (BASE, 1.0), (SLOPE, self.tokens), (ROW, self.rows), (CONTEXT, self.context)
        trees = ((TREES, 1.0),) if self.tokens > self.rows else ()
        return lines + trees + _hats(self.tokens, TOKENS)

    def drafted(self) -> Parts:
        """What the head does."""
        if self.passes == 0:
            return ()
        lines = (HEAD_BASE, 1.0), (HEAD_SLOPE, self.drafting), *_hats(self.drafting, HEAD)
        grown = tuple((part, weight * self.passes) for part, weight in lines)
        return (*grown, (HEAD_START, 1.0), (LATE, self.late))


@dataclass(frozen=True, slots=True)
class Sample:
    """A step that was timed."""

    work: Work
    seconds: float
    draft_seconds: float | None = None  # the head's part of them; None: unknown


@dataclass(slots=True)
class StepCosts:
    """Seconds of decode steps. All costs are relative to each other; `scale` is common to all."""

    values: list[float]  # seconds, by part
    doubts: list[float]  # their variances
    drifts: list[float]  # how much these grow from step to step
    limits: list[float]  # what they do not exceed
    scale: float = 1.0
    num_observed: int = 0

    @classmethod
    def guessed(cls) -> StepCosts:
        """Before any step."""
        costs = cls([guess for guess, _ in GUESSES], [error**2 for _, error in GUESSES], [], [])
        costs._bend()
        return costs

    @classmethod
    def fitted(cls, samples: Sequence[Sample]) -> StepCosts:
        """From a few steps: first the lines, then what deviates from them."""
        costs = cls.guessed()
        if not samples:
            return costs
        costs.scale = samples[0].seconds / costs._unscaled(samples[0].work)
        costs.doubts[TOKENS:] = [0.0] * (2 * len(KNOTS))
        for _ in range(FITS):
            for sample in samples:
                costs._learn_parts(sample)
        costs._bend()
        for sample in samples:
            costs._learn_parts(sample)
        costs.num_observed = len(samples)
        return costs

    def of(self, work: Work) -> float:
        """Seconds of a step."""
        return self.scale * self._unscaled(work)

    def doubt(self, work: Work) -> float:
        """How far the seconds of a step may be off: one standard error."""
        return self.scale * math.sqrt(self._variance(work.verified() + work.drafted()))

    def observe(self, sample: Sample) -> None:
        """Learn from a step."""
        if self.num_observed == 0:
            self.scale = sample.seconds / self._unscaled(sample.work)
        self.num_observed += 1
        predicted = self.of(sample.work)
        believed = min(max(sample.seconds, predicted / SURPRISE), predicted * SURPRISE)
        self.scale *= 1 + COMMON * (believed / predicted - 1)
        self.doubts = [
            min(doubt + drift, limit)
            for doubt, drift, limit in zip(self.doubts, self.drifts, self.limits, strict=True)
        ]
        self._learn_parts(replace(sample, seconds=believed))

    def _learn_parts(self, sample: Sample) -> None:
        """Learn what is not common to all parts."""
        work, seconds = sample.work, sample.seconds / self.scale
        if sample.draft_seconds is None or work.passes == 0:
            self._learn(work.verified() + work.drafted(), seconds)
            return
        own = min(sample.draft_seconds / self.scale, MOST_OF_HEAD * seconds)
        self._learn(work.verified(), seconds - own)
        self._learn(work.drafted(), own)

    def _bend(self) -> None:
        """Let costs deviate from the lines."""
        del self.values[TOKENS:], self.doubts[TOKENS:]
        for base, slope in ((BASE, SLOPE), (HEAD_BASE, HEAD_SLOPE)):
            self.values += [0.0] * len(KNOTS)
            lines = [self.values[base] + self.values[slope] * knot for knot in KNOTS]
            self.doubts += [(BENT * seconds) ** 2 for seconds in lines]
        self.drifts = [(DRIFT * value) ** 2 for value in self.values[:TOKENS]]
        self.drifts += [doubt * (DRIFT / BENT) ** 2 for doubt in self.doubts[TOKENS:]]
        self.limits = [
            max(error**2, doubt)
            for doubt, (_, error) in zip(self.doubts[:TOKENS], GUESSES, strict=True)
        ]
        self.limits += self.doubts[TOKENS:]

    def _unscaled(self, work: Work) -> float:
        least = LEAST * self.values[BASE]
        return max(least, self._sum(work.verified())) + max(0.0, self._sum(work.drafted()))

    def _sum(self, parts: Parts) -> float:
        values, total = self.values, 0.0
        for part, weight in parts:  # `sum` would take twice as long
            total += values[part] * weight
        return total

    def _variance(self, parts: Parts) -> float:
        return sum(self.doubts[part] * weight * weight for part, weight in parts)

    def _learn(self, parts: Parts, seconds: float) -> None:
        """A Kalman filter whose errors are independent: the parts that are least known take most of
        the error. Its noise is relative to what was predicted: if it were to what was seen, slow
        steps would count for less than fast ones."""
        predicted = self._sum(parts)
        spread = (NOISE * predicted) ** 2 + 1e-18 + self._variance(parts)
        error = seconds - predicted
        for part, weight in parts:
            gain = self.doubts[part] * weight / spread
            value = self.values[part] + gain * error
            self.values[part] = value if part >= TOKENS else max(0.0, value)
            self.doubts[part] *= 1 - gain * weight


@dataclass(frozen=True, slots=True)
class Padding:
    """How steps are padded: work is counted with it."""

    rows: Callable[[int], int] = field(default=lambda count: count)
    whole_trees: bool = False  # every row has all nodes of the step's shape

    def work(self, nodes: Sequence[int], shape: TreeShape, context: int) -> Work:
        """Work of a step.

        Args:
            nodes: the head's draft nodes of each row.
        """
        most, num_rows = max(nodes, default=0), self.rows(len(nodes))
        if most == 0:
            return Work(num_rows, num_rows, context=context)
        if self.whole_trees:
            passes, width = _growth(shape, shape.num_nodes)
            num_tokens = num_rows * shape.num_nodes
            return Work(num_rows, num_tokens, num_rows * width, passes, context)
        passes, width = _growth(shape, 1 + most)
        drafting = width * sum(count > 0 for count in nodes)
        return Work(num_rows, num_rows + sum(nodes), drafting, passes, context)


def work_of(plan: StepPlan, outcome: StepOutcome, padding: Padding) -> Work:
    """Work of a step that only decoded."""
    context = sum(row.start for row in plan.rows)
    nodes = [row.num_draft if row.is_drafted else 0 for row in plan.rows]
    work = padding.work(nodes, plan.shape, context)
    found = sum(
        result.num_draft for row, result in zip(plan.rows, outcome.rows, strict=True) if row.draft
    )
    return Work(work.rows, work.tokens + found, work.drafting, work.passes, context)


def sample_of(
    plan: StepPlan, outcome: StepOutcome, seconds: float | None, padding: Padding
) -> Sample | None:
    """What a step that took `seconds` shows; None if it had prompts, or the engine was idle."""
    if seconds is None or not plan.rows or not plan.only_decodes:
        return None
    parts = outcome.seconds
    own = parts.get(DRAFT, 0.0) if VERIFY in parts else None
    return Sample(work_of(plan, outcome, padding), seconds, own)


@functools.cache
def _growth(shape: TreeShape, num_nodes: int) -> tuple[int, int]:
    """Passes of the head to grow the first nodes of a shape, one for each level; and the nodes of a
    row in each, on average."""
    shape = shape.first(num_nodes)
    inner = len(set(shape.parents)) - 1 if isinstance(shape, StaticShape) else shape.num_drafted
    return shape.max_depth, max(1, round(inner / shape.max_depth))


@functools.lru_cache(maxsize=4096)
def _hats(count: int, first: int) -> Parts:
    """Weights of the knots around `count`; after the last knot, in proportion."""
    at = bisect_right(KNOTS, count) - 1
    if at < 0:
        return ()
    if at == len(KNOTS) - 1:
        return ((first + at, count / KNOTS[at]),)
    share = (count - KNOTS[at]) / (KNOTS[at + 1] - KNOTS[at])
    return (first + at, 1 - share), (first + at + 1, share)
