"""Chooses which rows of the next step draft, and how deep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from engine.speculation.acceptance import Acceptance
from engine.speculation.costs import Padding, StepCosts, Work, sample_of
from engine.step.plan import StepOutcome, StepPlan
from engine.step.shape import ROOT, StaticShape, TreeShape

Reaches = Sequence[Sequence[float]]  # by row: how likely each draft node is accepted


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row of the next step that decodes."""

    line: int
    sampled: bool  # not greedy
    context: int  # its cached tokens
    most: int  # draft nodes that its request and the context length allow


@dataclass(frozen=True, slots=True)
class Choice:
    """The trees of a step."""

    shape: TreeShape = ROOT
    limits: Mapping[int, int] | None = None  # most draft nodes by line; None: the whole shape
    price: float = 0.05  # accepted tokens that a node must yield to be worth verifying
    promises: Mapping[int, float] = field(default_factory=dict)  # see `promise`

    def limit(self, line: int) -> int:
        """Most draft nodes of the head for a row."""
        most = self.shape.num_nodes - 1
        return most if self.limits is None else min(most, self.limits.get(line, 0))

    def promise(self, line: int) -> float:
        """Accepted tokens that the head's tree promises for a row, less the price of its nodes and
        of growing it."""
        return self.promises.get(line, 0.0)


class Planner(Protocol):
    """Chooses trees per step. Only speed depends on it."""

    def choose(self, rows: Sequence[Candidate]) -> Choice:
        """The trees for a step in which these rows decode."""
        ...

    def observe(self, plan: StepPlan, outcome: StepOutcome, seconds: float | None) -> None:
        """Learn from a step. `seconds`: since the step before; None if the engine was idle."""
        ...


@dataclass(frozen=True, slots=True)
class FixedPlanner:
    """Always the same shape for every row. Its costs say what a looked-up node is worth."""

    shape: TreeShape = ROOT
    costs: StepCosts = field(default_factory=StepCosts.guessed, compare=False)
    padding: Padding = field(default_factory=Padding)
    _accepted: list[float] = field(default_factory=lambda: [0.0], compare=False)

    def choose(self, rows: Sequence[Candidate]) -> Choice:
        able = [row for row in rows if row.most]
        if not able:
            return Choice()
        roots = self.padding.work([0] * len(rows), ROOT, sum(row.context for row in rows))
        price = node_price(self.costs, roots)
        if self.shape == ROOT:
            return Choice(price=price)
        net = self._accepted[0] - price * (self.shape.num_nodes - 1)
        return Choice(self.shape, None, price, {row.line: net for row in able})

    def observe(self, plan: StepPlan, outcome: StepOutcome, seconds: float | None) -> None:
        for row, result in zip(plan.rows, outcome.rows, strict=True):
            if row.is_drafted:  # counts 0 if the head has failed or knows nothing of the row
                self._accepted[0] += 0.02 * (len(result.path) - self._accepted[0])
        if sample := sample_of(plan, outcome, seconds, self.padding):
            self.costs.observe(sample)


CLEAR = 1.02  # a tree must promise so many times the tokens per second of plain decoding
PROBE_EVERY = 48  # steps after which rows that do not draft are tried again
FIRST_PROBE = 12  # the same if one of them is new
KEEP_EVERY = 1000  # observed steps
PROBE_SHARE = 0.012  # of the time
MOST_REPEATS = 8  # probes after one that was accepted
REFERENCES = (4, 8, 16, 32, 64)  # steps with drafts before the n-th plain one, which shows its time


@dataclass(frozen=True, slots=True)
class Option:
    """A way to run the next step."""

    shape: StaticShape
    nodes: Sequence[int]  # draft nodes of each row
    tokens: float  # expected, of all rows
    work: Work
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class AdaptivePlanner:
    """Takes the trees with the most expected tokens per second: from the costs of steps, and from
    the acceptance of each row. A step whose gain is not clear is plain.

    Rows that do not draft are tried now and then with one node, and a plain step after some with
    drafts shows what one takes now. A probe that found no room stays due.
    """

    def __init__(
        self,
        shapes: Sequence[StaticShape],
        costs: StepCosts,
        padding: Padding | None = None,
        keep: Callable[[StepCosts], None] | None = None,
    ) -> None:
        """
        Args:
            shapes: the candidates besides the lone root, the cheapest first. They are static: the
                acceptance by rank does not predict the tokens of a dynamic shape.
            keep: called now and then with what was learnt.
        """
        self._keep = keep
        self._shapes = tuple(shapes)
        self._longest = {shape: _longest(shape, shapes) for shape in shapes}
        self._costs = costs
        self._padding = padding or Padding()
        self._acceptance = Acceptance()
        self._sampled: dict[int, bool] = {}  # by line, of rows chosen for
        self._idle: dict[int, int] = {}  # steps since a row drafted, by line
        self._num_plain = 0  # steps since any row drafted
        self._num_drafted = 0  # steps with drafts since the last reference
        self._num_references = 0  # since drafts began to pay
        self._hopeful: set[int] = set()  # lines whose last node was accepted
        self._num_probed = 0  # rows that drafted in the last step that did
        self._num_repeats = 0  # probes in a row
        self._has_failed = False

    def choose(self, rows: Sequence[Candidate]) -> Choice:
        if not any(row.most for row in rows):
            return Choice()
        self._sampled |= {row.line: row.sampled for row in rows}
        plain = self._option(ROOT, rows, [0] * len(rows), 0.0)
        if self._has_failed:
            return Choice(price=node_price(self._costs, plain.work))
        best, reaches = self._best(rows, plain)
        price = node_price(self._costs, best.work, best.rate)
        if self._is_reference(best):
            return Choice(price=node_price(self._costs, plain.work))
        nodes = self._with_probes(rows, best)
        shape = self._shapes[0] if best.shape == ROOT and any(nodes) else best.shape
        limits = {row.line: count for row, count in zip(rows, nodes, strict=True)}
        padded = self._padding.whole_trees and any(nodes)
        promises = self._promises(rows, best, reaches, price)
        return Choice(shape, None if padded else limits, price, promises)

    def observe(self, plan: StepPlan, outcome: StepOutcome, seconds: float | None) -> None:
        for admission in plan.admitted:
            self._acceptance.forget(admission.line)
            self._idle[admission.line] = PROBE_EVERY - FIRST_PROBE
        self._has_failed = outcome.draft_failed
        if plan.is_drafted:
            self._num_plain = 0
            self._observe_trees(plan, outcome)
        if sample := sample_of(plan, outcome, seconds, self._padding):
            self._costs.observe(sample)
            if self._keep is not None and self._costs.num_observed % KEEP_EVERY == 0:
                self._keep(self._costs)

    def _best(
        self, rows: Sequence[Candidate], plain: Option
    ) -> tuple[Option, Mapping[StaticShape, Reaches]]:
        """The option with the most tokens per second, and how likely each row's nodes are
        accepted."""
        reaches = {longest: self._reaches(rows, longest) for longest in set(self._longest.values())}
        best = plain
        for shape in self._shapes:
            reach = reaches[self._longest[shape]]
            for option in self._options(shape, rows, reach, max(best, plain, key=_rate)):
                best = max(best, option, key=_rate)
        return (best if best.rate > CLEAR * plain.rate else plain), reaches

    def _options(
        self, shape: StaticShape, rows: Sequence[Candidate], reaches: Reaches, best: Option
    ) -> Iterator[Option]:
        """Ways to use one shape: for all rows for which its nodes are worth their price, and for
        the more promising of these."""
        most = shape.num_nodes - 1
        if self._padding.whole_trees:
            nodes = [min(row.most, most) for row in rows]
            yield self._option(shape, rows, nodes, _gain(reaches, nodes))
            return
        price = node_price(self._costs, best.work, best.rate)
        nodes, nets = [], []
        for row, reach in zip(rows, reaches, strict=True):
            count, net = _worth(reach[: min(row.most, most)], price)
            nodes.append(count)
            nets.append(net)
        order = sorted((at for at, count in enumerate(nodes) if count), key=nets.__getitem__)
        while order:
            yield self._option(shape, rows, nodes, _gain(reaches, nodes))
            for at in order[: (len(order) + 1) // 2]:
                nodes = [*nodes[:at], 0, *nodes[at + 1 :]]
            order = order[(len(order) + 1) // 2 :]

    def _option(
        self, shape: StaticShape, rows: Sequence[Candidate], nodes: Sequence[int], gain: float
    ) -> Option:
        work = self._padding.work(nodes, shape, sum(row.context for row in rows))
        return Option(shape, nodes, len(rows) + gain, work, self._costs.of(work))

    def _reaches(self, rows: Sequence[Candidate], shape: StaticShape) -> Reaches:
        reach = self._acceptance.reach
        return [reach(row.line, shape, sampled=row.sampled) if row.most else [] for row in rows]

    def _promises(
        self,
        rows: Sequence[Candidate],
        best: Option,
        reaches: Mapping[StaticShape, Reaches],
        price: float,
    ) -> dict[int, float]:
        """See `Choice.promise`. Each row that drafts bears an equal part of the head's time."""
        if best.work.passes == 0:
            return {}
        without = replace(best.work, drafting=0, passes=0)
        head = best.rate * (best.seconds - self._costs.of(without)) / best.work.drafting
        reach = reaches[self._longest[best.shape]]
        return {
            row.line: sum(reach[at][:count]) - price * count - head
            for at, (row, count) in enumerate(zip(rows, best.nodes, strict=True))
            if count
        }

    def _is_reference(self, best: Option) -> bool:
        """Whether this step should be plain although drafts pay."""
        if best.work.passes == 0:
            self._num_drafted = self._num_references = 0
            return False
        self._num_drafted += 1
        if self._num_drafted <= REFERENCES[min(self._num_references, len(REFERENCES) - 1)]:
            return False
        self._num_drafted = 0
        self._num_references += 1
        return True

    def _with_probes(self, rows: Sequence[Candidate], best: Option) -> list[int]:
        """The nodes of each row, with one for each row that is to be tried."""
        nodes, able = list(best.nodes), []
        self._num_plain += 1
        for at, row in enumerate(rows):
            idle = self._idle[row.line] = self._idle.get(row.line, 0) + 1
            if row.most and not nodes[at]:
                able.append((idle, at))
        able.sort(reverse=True)
        if any(nodes):
            due = [at for idle, at in able if idle >= PROBE_EVERY]
            self._num_repeats = 0
        else:
            due = self._repeated_probes(rows, able) or self._affordable_probes(able, best)
        for at in due:
            nodes[at] = 1
        return nodes

    def _repeated_probes(
        self, rows: Sequence[Candidate], able: Sequence[tuple[int, int]]
    ) -> list[int]:
        """Rows to try again because their last nodes were accepted; and as many others, if most
        were."""
        hopeful = [at for _, at in able if rows[at].line in self._hopeful]
        if not hopeful or self._num_repeats >= MOST_REPEATS:
            self._num_repeats = 0
            self._hopeful.clear()
            return []
        self._num_repeats += 1
        if 2 * len(hopeful) <= self._num_probed:
            return hopeful
        others = [at for _, at in able if at not in hopeful]
        return hopeful + others[: self._num_probed]

    def _affordable_probes(self, able: Sequence[tuple[int, int]], plain: Option) -> list[int]:
        """Rows that should draft though it does not seem to pay: as many as the time for probes
        allows. `able`: for how many steps each did not draft, the longest first."""
        if not able:
            return []
        gap = FIRST_PROBE if able[0][0] == PROBE_EVERY else PROBE_EVERY
        if self._num_plain < gap:
            return []
        time = PROBE_SHARE * self._num_plain * plain.seconds
        count = len(able)
        while count > 1 and self._probe_seconds(plain, count) > time:
            count //= 2
        return [at for _, at in able[:count]]

    def _probe_seconds(self, plain: Option, count: int) -> float:
        """What a node for each of `count` rows adds to a step."""
        nodes = [1] * count + [0] * (len(plain.nodes) - count)
        work = self._padding.work(nodes, self._shapes[0], plain.work.context)
        return self._costs.of(work) - plain.seconds

    def _observe_trees(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Learn from the head's trees."""
        shape = next((shape for shape in self._shapes if shape == plan.shape), ROOT)
        self._hopeful.clear()
        self._num_probed = sum(row.is_drafted for row in plan.rows)
        for row, result in zip(plan.rows, outcome.rows, strict=True):
            if not row.is_drafted:
                continue
            if self._idle.get(row.line, 0) >= PROBE_EVERY // 2:
                self._acceptance.fade(row.line)
            self._idle[row.line] = 0
            if result.path:
                self._hopeful.add(row.line)
            # No nodes: the head knows nothing of the row. Such a tree counts as rejected.
            num_nodes = 1 + (result.num_draft or row.num_draft)
            sampled = self._sampled.get(row.line, False)
            self._acceptance.observe(row.line, shape, num_nodes, result.path, sampled=sampled)


def node_price(costs: StepCosts, work: Work, rate: float | None = None) -> float:
    """Accepted tokens that a node must yield to be worth verifying: its seconds times the tokens
    per second of the best step without it (None: of a plain one)."""
    more = max(4, work.rows)
    before, after = costs.of(work), costs.of(replace(work, tokens=work.tokens + more))
    rate = work.rows / before if rate is None else rate
    return min(1.0, max(0.0, (after - before) / more * rate))


def _rate(option: Option) -> float:
    return option.rate


def _longest(shape: StaticShape, shapes: Sequence[StaticShape]) -> StaticShape:
    """The largest of the shapes that begins with `shape`."""
    begin = [one for one in shapes if one.parents[: shape.num_nodes] == shape.parents]
    return max(begin, key=lambda one: one.num_nodes)


def _gain(reaches: Reaches, nodes: Sequence[int]) -> float:
    """Expected accepted tokens of all rows."""
    return sum(sum(reach[:count]) for reach, count in zip(reaches, nodes, strict=True))


def _worth(reach: Sequence[float], price: float) -> tuple[int, float]:
    """How many of the first nodes together yield most above their price, and how much."""
    best, net, count = 0.0, 0.0, 0
    for at, chance in enumerate(reach):
        net += chance - price
        if net > best:
            best, count = net, at + 1
    return count, best
