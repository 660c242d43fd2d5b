"""Chooses which rows of the next step draft, and how deep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from engine.speculation.acceptance import Acceptance
from engine.speculation.account import Account
from engine.speculation.costs import Padding, Sample, StepCosts, Work, sample_of
from engine.speculation.looks import Looks
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
    least: int = 0  # of these, what its request wants even if they do not pay


@dataclass(frozen=True, slots=True)
class Choice:
    """The trees of a step."""

    shape: TreeShape = ROOT
    limits: Mapping[int, int] | None = None  # most draft nodes by line; None: the whole shape
    price: float = 0.05  # accepted tokens that a node must yield to be worth verifying
    entry: float = 0.0  # the same for the first looked-up node of the step, besides its price
    may_try: bool = True  # whether a lookup that does not pay may be tried
    looks_up: bool = True  # whether drafts are looked up at all
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


@dataclass(slots=True)
class FixedPlanner:
    """Always the same shape for every row. Its costs say what a looked-up node is worth; they are
    looked at once in a while, because that takes time, too."""

    shape: TreeShape = ROOT
    costs: StepCosts = field(default_factory=StepCosts.guessed, compare=False)
    padding: Padding = field(default_factory=Padding)
    _accepted: float = field(default=0.0, compare=False)  # lately, of a tree
    _prices: tuple[float, float] = field(default=(0.0, 0.0), compare=False)  # of a node; of a start
    _num_rows: int = field(default=0, compare=False)  # for which these hold
    _num_standing: int = field(default=0, compare=False)  # steps for which they hold

    def choose(self, rows: Sequence[Candidate]) -> Choice:
        able = [row for row in rows if row.most]
        if not able:
            return Choice()
        if self._num_standing == 0 or self._num_rows != len(rows):
            self._set_prices(rows)
        price, entry = self._prices
        if self.shape == ROOT:
            return Choice(price=price, entry=entry)
        net = self._accepted - price * (self.shape.num_nodes - 1)
        return Choice(self.shape, None, price, promises={row.line: net for row in able})

    def observe(self, plan: StepPlan, outcome: StepOutcome, seconds: float | None) -> None:
        for row, result in zip(plan.rows, outcome.rows, strict=True):
            if row.is_drafted:  # counts 0 if the head has failed or knows nothing of the row
                self._accepted += 0.02 * (len(result.path) - self._accepted)
        self._num_standing = max(0, self._num_standing - 1)
        if self._num_standing:
            return
        if sample := sample_of(plan, outcome, seconds, self.padding):
            self.costs.observe(sample)

    def _set_prices(self, rows: Sequence[Candidate]) -> None:
        roots = self.padding.work([0] * len(rows), ROOT, sum(row.context for row in rows))
        self._prices = node_price(self.costs, roots), entry_price(self.costs, roots)
        self._num_rows, self._num_standing = len(rows), STANDING


CLEAR = 1.02  # a tree must promise so many times the tokens per second of plain decoding
# A trial takes chances to be so many standard errors better than they seem, for each plain step in
# credit; those beyond `MOST_HOPE` do not count.
HOPE = 0.425
MOST_HOPE = 7.0
LATE_STEPS = 16  # so many of the newest tokens of a row the head takes when the row drafts again
KEEP_EVERY = 1000  # observed steps
STANDING = 7  # steps for which a decision against drafts or against a trial stands
STANDING_DRAFTS = 3  # the same of one for drafts: planning takes time, too
SURE = 2  # decisions for drafts between two that look for a trial
PLAIN_PER_SAMPLE = 4  # standing plain steps of which one is learnt from: learning takes time, too
EAGER = 32  # decisions of an engine that look for a trial, before it does so more rarely


NOTHING = Choice(price=1.0, may_try=False)  # neither the head nor lookup drafts


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

    What is uncertain is found out by trials: trees that would be best if acceptance were better
    than it seems. An `Account` is kept of what drafts win or lose against plain steps, and drafts
    wait while it is overdrawn. The fuller it is, the further trials go.
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
        self._account = Account(costs)
        self._has_failed = False
        self._num_rows = 0  # of the last step that was planned
        self._standing = Choice()  # what it was
        self._num_standing = 0  # steps for which that stands if no rows come
        self._num_sure = 0  # decisions that look for no trial
        self._is_sure = False  # whether the last was one of these
        self._num_looks = 0  # decisions that looked for a trial
        self._looks = Looks()
        self._num_passed = 0  # plain steps that nothing was learnt from, since one was
        self._wanted: set[int] = set()  # lines of rows whose requests want drafts that may not pay

    def choose(self, rows: Sequence[Candidate]) -> Choice:
        choice = self._what_pays(rows)
        self._wanted = {row.line for row in rows if choice.limit(row.line) < row.least}
        return self._as_wanted(rows, choice) if self._wanted and not self._has_failed else choice

    def _what_pays(self, rows: Sequence[Candidate]) -> Choice:
        if not any(row.most for row in rows):
            return Choice()
        if self._num_standing and len(rows) <= self._num_rows:
            self._num_standing -= 1
            if self._standing.shape == ROOT:
                return self._paced(self._standing)
            num_rows = self._padding.rows(len(rows))
            if self._account.is_reference(num_rows):
                return NOTHING
            if not self._account.is_overdrawn(num_rows):
                return self._standing
        self._num_standing, self._num_rows = 0, len(rows)
        self._sampled |= {row.line: row.sampled for row in rows}
        plain = self._option(ROOT, rows, [0] * len(rows), 0.0)
        self._account.open(plain.work)
        if self._account.is_reference(plain.work.rows):
            return NOTHING
        reaches = self._reaches(rows)
        best = plain if self._has_failed else self._best(rows, reaches, plain)
        if best.work.passes == 0:
            self._num_standing = 0 if self._has_failed else STANDING
            self._standing = self._without_head(plain)
            return self._paced(self._standing)
        price = node_price(self._costs, best.work, max(best.rate, plain.rate))
        limits = {row.line: count for row, count in zip(rows, best.nodes, strict=True)}
        promises = self._promises(rows, best, reaches[self._longest[best.shape]], price)
        whole = self._padding.whole_trees
        choice = Choice(best.shape, None if whole else limits, price, promises=promises)
        self._standing = choice
        if self._is_sure:
            self._num_standing = STANDING_DRAFTS
        return choice

    def _as_wanted(self, rows: Sequence[Candidate], choice: Choice) -> Choice:
        """`choice` with as many nodes as requests want, where that is more."""
        limits = {row.line: max(row.least, choice.limit(row.line)) for row in rows}
        most = max(limits.values())
        by_size = sorted(self._shapes, key=lambda shape: shape.num_nodes)
        shape = next((each for each in by_size if each.num_nodes > most), by_size[-1])
        plain = self._padding.work([0] * len(rows), ROOT, sum(row.context for row in rows))
        price = node_price(self._costs, plain)
        return Choice(shape, None if self._padding.whole_trees else limits, price)

    def observe(self, plan: StepPlan, outcome: StepOutcome, seconds: float | None) -> None:
        for admission in plan.admitted:
            self._acceptance.forget(admission.line)
            self._idle.pop(admission.line, None)
            self._num_standing = self._num_sure = 0
        self._has_failed = outcome.draft_failed
        if self._has_failed:
            self._num_standing = 0
        if self._counts(plan):
            self._observe_costs(plan, outcome, seconds)
        self._looks.observe(plan, outcome)
        self._acceptance.fade()
        self._observe_trees(plan, outcome)
        for row in plan.rows:
            if row.samples:
                self._idle[row.line] = 0 if row.is_drafted else self._idle.get(row.line, 0) + 1

    def _counts(self, plan: StepPlan) -> bool:
        """Whether to learn from a step. While drafts do not pay, most steps are passed over."""
        is_usual = self._num_standing > 0 and all(row.num_draft == 0 for row in plan.rows)
        if is_usual and self._num_passed + 1 < PLAIN_PER_SAMPLE:
            self._num_passed += 1
            return False
        return True

    def _best(
        self,
        rows: Sequence[Candidate],
        reaches: Mapping[StaticShape, Reaches],
        plain: Option,
    ) -> Option:
        """The option with the most tokens per second, or a trial of another."""
        if self._account.is_overdrawn(plain.work.rows):
            return plain
        best = max(self._options(rows, reaches, plain), key=_rate, default=plain)
        if best.rate <= CLEAR * plain.rate:
            best = plain
        self._is_sure = self._num_sure > 0
        if self._is_sure:
            self._num_sure -= 1
            return best
        self._num_looks += 1
        if best.work.passes and self._num_looks > EAGER:
            self._num_sure = SURE
        return self._trial(rows, reaches, plain, best) or best

    def _options(
        self, rows: Sequence[Candidate], reaches: Mapping[StaticShape, Reaches], plain: Option
    ) -> Iterator[Option]:
        """Ways to draft: each shape for all rows for which its nodes are worth their price, and for
        the more promising of these. The price is that of the best option so far."""
        best = plain
        for shape in self._shapes:
            for option in self._uses(shape, rows, reaches[self._longest[shape]], best):
                best = max(best, option, key=_rate)
                yield option

    def _uses(
        self, shape: StaticShape, rows: Sequence[Candidate], reaches: Reaches, best: Option
    ) -> Iterator[Option]:
        """Ways to use one shape."""
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

    def _trial(
        self,
        rows: Sequence[Candidate],
        reaches: Mapping[StaticShape, Reaches],
        plain: Option,
        best: Option,
    ) -> Option | None:
        """What would be better than `best` if acceptance and costs were better than they seem, with
        one more node per row at most; nothing whose expected loss is not covered."""
        found: Option | None = None
        least, most = CLEAR * best.rate, [1 + count for count in best.nodes]
        credit = self._account.credit(plain.work.rows)
        hope = HOPE * min(MOST_HOPE, credit / plain.seconds)
        for option in self._options(rows, self._reaches(rows, hope, most), plain):
            doubt = min(hope * self._costs.doubt(option.work), option.seconds / 3)
            rate = option.tokens / max(plain.seconds, option.seconds - doubt)
            if rate <= least or option.nodes == best.nodes:
                continue
            drafting = [row.line for row, n in zip(rows, option.nodes, strict=True) if n]
            seconds = self._costs.of(replace(option.work, late=self._late(drafting)))
            tokens = len(rows) + _gain(reaches[self._longest[option.shape]], option.nodes)
            if seconds - tokens / best.rate <= credit:
                found, least = replace(option, tokens=tokens), rate
        return found

    def _reaches(
        self, rows: Sequence[Candidate], hope: float = 0.0, most: Sequence[int] | None = None
    ) -> Mapping[StaticShape, Reaches]:
        """By shape: how likely each row's nodes are accepted, the first `most` of each row."""
        reach, counts = self._acceptance.reach, [row.most for row in rows]
        if most is not None:
            counts = [min(pair) for pair in zip(counts, most, strict=True)]
        return {
            shape: [
                reach(row.line, shape, sampled=row.sampled, hope=hope)[:count] if count else []
                for row, count in zip(rows, counts, strict=True)
            ]
            for shape in set(self._longest.values())
        }

    def _paced(self, choice: Choice) -> Choice:
        """A plain choice; it looks up no drafts if that has brought nothing lately."""
        return choice if self._looks.is_due() else replace(choice, looks_up=False)

    def _without_head(self, plain: Option) -> Choice:
        """A step in which the head does not draft. Lookups have to pay, or to be paid for."""
        credit = self._account.credit(plain.work.rows)
        if credit < 0:
            return NOTHING
        price = node_price(self._costs, plain.work, plain.rate)
        entry = entry_price(self._costs, plain.work) + (CLEAR - 1) * plain.tokens
        return Choice(
            price=price,
            entry=entry,
            may_try=(entry + price) / plain.rate <= credit,
        )

    def _promises(
        self, rows: Sequence[Candidate], best: Option, reaches: Reaches, price: float
    ) -> dict[int, float]:
        """See `Choice.promise`. Each row that drafts bears an equal part of the head's time."""
        without = replace(best.work, drafting=0, passes=0)
        head = best.rate * (best.seconds - self._costs.of(without)) / best.work.drafting
        return {
            row.line: sum(reach[:count]) - price * count - head
            for row, reach, count in zip(rows, reaches, best.nodes, strict=True)
            if count
        }

    def _late(self, lines: Sequence[int]) -> int:
        """How many tokens the head takes first if these rows draft."""
        if self._padding.whole_trees:
            return 0  # it took them in the steps that committed them
        return sum(min(self._idle.get(line, 0), LATE_STEPS) for line in lines)

    def _observe_costs(self, plan: StepPlan, outcome: StepOutcome, seconds: float | None) -> None:
        sample = sample_of(plan, outcome, seconds, self._padding)
        if sample is None:
            return
        drafted = [row.line for row in plan.rows if row.is_drafted]
        sample = replace(sample, work=replace(sample.work, late=self._late(drafted)))
        if all(line in self._idle for line in drafted):
            self._learn_costs(sample)  # of a new row, the head may have taken any number of tokens
        if not self._wanted.intersection(drafted):  # these may lose
            num_tokens = sum(len(row.emitted) for row in outcome.rows)
            self._account.settle(sample, num_tokens, num_steps=1 + self._num_passed)
        self._num_passed = 0

    def _learn_costs(self, sample: Sample) -> None:
        self._costs.observe(sample)
        if self._keep is not None and self._costs.num_observed % KEEP_EVERY == 0:
            self._keep(self._costs)

    def _observe_trees(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Learn from the head's trees."""
        shape = next((shape for shape in self._shapes if shape == plan.shape), ROOT)
        for row, result in zip(plan.rows, outcome.rows, strict=True):
            if not row.is_drafted:
                continue
            # No nodes: the head knows nothing of the row. Such a tree counts as rejected.
            num_nodes = 1 + (result.num_draft or row.num_draft)
            sampled = self._sampled.get(row.line, False)
            self._acceptance.observe(row.line, shape, num_nodes, result.path, sampled=sampled)


def node_price(costs: StepCosts, work: Work, rate: float | None = None) -> float:
    """Accepted tokens that a node must yield to be worth verifying: its seconds times the tokens
    per second of the best step without it (None: of a plain one)."""
    more, first = max(4, work.rows), max(work.tokens, work.rows + 1)  # see `entry_price`
    before, after = (costs.of(replace(work, tokens=tokens)) for tokens in (first, first + more))
    rate = work.rows / costs.of(work) if rate is None else rate
    return min(1.0, max(0.0, (after - before) / more * rate))


def entry_price(costs: StepCosts, plain: Work) -> float:
    """Accepted tokens that the drafts of a step must yield together besides the price of their
    nodes, because it is not plain."""
    one, two = (costs.of(replace(plain, tokens=plain.rows + count)) for count in (1, 2))
    before = costs.of(plain)
    return max(0.0, (one - (two - one) - before) * plain.rows / before)


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
