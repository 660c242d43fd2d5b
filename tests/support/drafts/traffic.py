"""Made-up traffic for planners: rows with given acceptance, and steps with given costs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from engine.speculation.costs import Padding, Work
from engine.speculation.planner import Candidate, Choice, Planner
from engine.step.plan import Admission, RowOutcome, StepOutcome, StepPlan
from engine.step.shape import ROOT, StaticShape, chain
from tests.support.engines.in_process import ask
from tests.support.engines.plans import decoding

CHAINS = (chain(1), chain(2), chain(3), chain(5))
Cost = Callable[[Work], float]


@dataclass(frozen=True)
class Kind:
    """Requests alike."""

    chances: tuple[float, ...]  # of a draft token, by depth; the last holds for all deeper ones
    sampled: bool = False

    def chance(self, depth: int) -> float:
        return self.chances[min(depth, len(self.chances) - 1)]

    def gain(self, num_nodes: int) -> float:
        """Expected accepted tokens of a chain."""
        gain, reach = 0.0, 1.0
        for depth in range(num_nodes):
            reach *= self.chance(depth)
            gain += reach
        return gain


Kinds = Callable[[int, int], Kind]  # of the row, at a step


@dataclass
class Simulation:
    """Rows that decode for ever; each is replaced by a new one after `length` tokens."""

    cost: Cost
    kinds: Kinds
    num_rows: int
    length: int = 200
    noise: float = 0.03  # relative, of step times
    disturbed: Callable[[random.Random], float] = lambda _: 1.0  # a factor of each time seen
    resumed: float = 0.0  # seconds more of a step that drafts after one that did not
    seed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    plain: float = 0.0  # seconds that plain decoding would have taken for the same tokens
    best: float = 0.0  # the same for one who knows all
    _lengths: list[int] = field(default_factory=list)
    _best_rates: dict[tuple[Kind, ...], float] = field(default_factory=dict)
    _drafted: bool = False  # in the newest step

    def run(self, planner: Planner, num_steps: int, warm_up: int = 0) -> None:
        """`warm_up`: first steps that are not counted."""
        luck = random.Random(self.seed)
        new = list(range(self.num_rows))
        self._lengths = [luck.randrange(self.length) for _ in new]
        for step in range(warm_up + num_steps):
            if step == warm_up:
                self.tokens, self.seconds, self.plain, self.best = 0, 0.0, 0.0, 0.0
            kinds = [self.kinds(row, step) for row in range(self.num_rows)]
            choice = planner.choose(
                [
                    Candidate(row, kind.sampled, 100 + self._lengths[row], 5)
                    for row, kind in enumerate(kinds)
                ]
            )
            plan, outcome, seconds = self._step(choice, kinds, luck, new)
            seen = seconds * luck.gauss(1.0, self.noise) * self.disturbed(luck)
            planner.observe(plan, outcome, seen)
            new = self._after(outcome, kinds, seconds)

    def _step(
        self, choice: Choice, kinds: Sequence[Kind], luck: random.Random, new: Sequence[int]
    ) -> tuple[StepPlan, StepOutcome, float]:
        nodes = [choice.limit(row) for row in range(self.num_rows)]
        rows = tuple(
            msgspec.structs.replace(decoding(row, count), start=100 + length)
            for row, (count, length) in enumerate(zip(nodes, self._lengths, strict=True))
        )
        outcomes = []
        for kind, count in zip(kinds, nodes, strict=True):
            path: list[int] = []
            while len(path) < count and luck.random() < kind.chance(len(path)):
                path.append(len(path) + 1)
            outcomes.append(RowOutcome((1,) * (1 + len(path)), count, tuple(path)))
        admitted = tuple(Admission(row, ask(f"{row}", [1, 2])) for row in new)
        plan = StepPlan(rows=rows, admitted=admitted, shape=choice.shape)
        seconds = self.cost(self._work(nodes, choice.shape))
        resumes, self._drafted = any(nodes) and not self._drafted, any(nodes)
        return plan, StepOutcome(tuple(outcomes)), seconds + self.resumed * resumes

    def _work(self, nodes: Sequence[int], shape: StaticShape = ROOT) -> Work:
        return Padding().work(nodes, shape, sum(100 + length for length in self._lengths))

    def _after(self, outcome: StepOutcome, kinds: Sequence[Kind], seconds: float) -> list[int]:
        """Count a step; returns the rows that are new."""
        emitted = [len(row.emitted) for row in outcome.rows]
        self.tokens += sum(emitted)
        self.seconds += seconds
        self.plain += sum(emitted) * self.cost(self._work([0] * self.num_rows)) / self.num_rows
        known = tuple(kinds)
        if known not in self._best_rates:
            self._best_rates[known] = self._best_rate(known)
        self.best += sum(emitted) / self._best_rates[known]
        self._lengths = [known + more for known, more in zip(self._lengths, emitted, strict=True)]
        done = [row for row, length in enumerate(self._lengths) if length >= self.length]
        for row in done:
            self._lengths[row] = 0
        return done

    def _best_rate(self, kinds: Sequence[Kind]) -> float:
        """Tokens per second of the best choice for those who know acceptance and costs."""
        found = self.num_rows / self.cost(self._work([0] * self.num_rows))
        for shape in CHAINS:
            most = shape.num_nodes - 1
            for depth in range(1, most + 1):
                order = sorted(range(self.num_rows), key=lambda row: -kinds[row].gain(depth))
                for count in {1, 2, 4, 8, 16, 32, self.num_rows} & set(range(self.num_rows + 1)):
                    nodes = [0] * self.num_rows
                    for row in order[:count]:
                        nodes[row] = depth
                    tokens = self.num_rows + sum(kinds[row].gain(depth) for row in order[:count])
                    found = max(found, tokens / self.cost(self._work(nodes, shape)))
        return found
