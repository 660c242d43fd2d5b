"""Prompt lookup: draft what followed when the newest tokens stood in the text before.

Answers repeat their prompt and themselves: names, code, quotations, lists (LLMA, arXiv:2304.04487;
prompt lookup decoding). Such a draft costs no forward of any head; the nodes it adds to the
verification are all it has to earn. How likely a token of it is accepted is learnt from what was,
by the length of the match; what a node costs is learnt from how long steps took.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.request import Sequence
from engine.speculation.ngrams import LENGTHS, TokenText
from engine.step.plan import DRAFT, RowOutcome, RowPlan, StepOutcome, StepPlan
from engine.step.shape import ROOT

NAME = "lookup"  # of the tree, in statistics
MAX_DRAFT = 16  # tokens of one draft
DECAY = 0.98  # weight of the past per observation
PRIOR = (0.5, 0.55, 0.6, 0.7, 0.8, 0.85)  # chance of a token, by length of the match
PRIOR_TOKENS = 8.0  # how many observations the prior stands for
PRIOR_COST = 0.05  # of a node, against that of a step without any
PROBE_EVERY = 64  # matches of one kind without a draft, and a token is tried all the same


@dataclass(slots=True)
class Chance:
    """Running share of drafted tokens that were accepted, of those whose parent was."""

    accepted: float
    seen: float = PRIOR_TOKENS
    passed_over: int = 0  # matches since the last probe

    @property
    def value(self) -> float:
        return self.accepted / self.seen

    def observe(self, num_draft: int, num_accepted: int) -> None:
        keep = DECAY ** (num_accepted + 1)
        self.accepted = self.accepted * keep + num_accepted
        self.seen = self.seen * keep + num_accepted + (num_accepted < num_draft)

    def probe(self) -> int:
        """How many tokens to draft where they promise too little: mostly none, but what is never
        tried would never be seen to have become better."""
        self.passed_over = (self.passed_over + 1) % PROBE_EVERY
        return int(self.passed_over == 0)


@dataclass(slots=True)
class StepTime:
    """A line through how long decode steps took: seconds = base + slope * tokens, by least squares
    with fading weights."""

    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        parts = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        old = (self.weight, self.tokens, self.seconds, self.squares, self.products)
        self.weight, self.tokens, self.seconds, self.squares, self.products = (
            DECAY * before + new for before, new in zip(old, parts, strict=True)
        )

    def price(self, num_rows: int) -> float:
        """Accepted tokens that a node has to bring, or it were better to verify none: its seconds
        in those that a plain step takes per token."""
        spread = self.weight * self.squares - self.tokens**2
        if spread <= 1e-6 * self.squares or self.seconds <= 0:
            return PRIOR_COST * num_rows / (1 + PRIOR_COST * num_rows)
        slope = max(0.0, (self.weight * self.products - self.tokens * self.seconds) / spread)
        base = (self.seconds - slope * self.tokens) / self.weight
        plain = base + slope * num_rows
        return min(1.0, slope * num_rows / plain) if plain > 0 else 1.0


@dataclass(slots=True)
class HeadAcceptance:
    """What the draft head gets accepted per row and step, and the time it takes for that."""

    accepted: float = 0.0
    share: float = 0.0  # of a step's other time

    def observe(self, accepted: float, seconds: Mapping[str, float]) -> None:
        others = sum(spent for part, spent in seconds.items() if part != DRAFT)
        share = seconds.get(DRAFT, 0.0) / others if others else 0.0
        self.accepted = DECAY * self.accepted + (1 - DECAY) * accepted
        self.share = DECAY * self.share + (1 - DECAY) * share

    def rival(self, num_rows: int) -> float:
        """Accepted tokens from which on a lookup is the better draft. A row alone saves the head's
        time, too."""
        if num_rows > 1:
            return self.accepted
        return (1 + self.accepted) / (1 + self.share) - 1


@dataclass(slots=True)
class Lookup:
    """Drafts for the rows of one scheduler. Only speed depends on it."""

    _texts: dict[str, TokenText] = field(default_factory=dict)
    _chances: dict[tuple[int, bool], Chance] = field(default_factory=dict)
    _matches: dict[str, tuple[int, bool]] = field(default_factory=dict)  # of the step's drafts
    _time: StepTime = field(default_factory=StepTime)
    _head: HeadAcceptance = field(default_factory=HeadAcceptance)

    def draft(self, seq: Sequence, most: int, num_rows: int, *, has_rival: bool) -> list[int]:
        """A chain of at most `most` tokens behind the newest one, where one promises to pay.

        Args:
            num_rows: that decode in this step.
            has_rival: the draft head would draft for this row.
        """
        self._matches.pop(seq.request_id, None)
        if most < 1:
            return []
        text = self._texts.setdefault(seq.request_id, TokenText())
        text.follow(seq.token_ids)
        length, place = text.longest_match()
        if length == 0:
            return []
        match = (length, seq.request.params.temperature > 0)
        known = self._chance(match)
        chance = known.value
        count = min(most, MAX_DRAFT, _worth(chance, self._time.price(num_rows)))
        promise = sum(chance**depth for depth in range(1, count + 1))
        if count < 1 or (has_rival and promise <= self._head.rival(num_rows)):
            count = known.probe()
        if count < 1:
            return []
        self._matches[seq.request_id] = match
        return text.continued(place, count)

    def forget(self, request_id: str) -> None:
        """The sequence has ended."""
        self._texts.pop(request_id, None)
        self._matches.pop(request_id, None)

    def observe(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Learn from what a step accepted, and from how long it took."""
        accepted_of_head: list[int] = []
        for row, result in zip(plan.rows, outcome.rows, strict=True):
            if row.draft and row.request_id in self._matches:
                chance = self._chance(self._matches[row.request_id])
                chance.observe(result.num_draft, len(result.path))
            elif row.num_draft:  # none verified: the head has failed, or knows nothing of the row
                accepted_of_head.append(len(result.path))
        if not all(row.samples and len(row.token_ids) == 1 for row in plan.rows):
            return  # prompts in between: neither time tells anything about decoding
        self._observe_time(plan.rows, outcome, accepted_of_head)

    def _observe_time(
        self, rows: tuple[RowPlan, ...], outcome: StepOutcome, accepted_of_head: list[int]
    ) -> None:
        spent = sum(time for part, time in outcome.seconds.items() if part != DRAFT)
        if spent:
            self._time.observe(_num_verified(rows, outcome.rows), spent)
        if accepted_of_head:
            mean = sum(accepted_of_head) / len(accepted_of_head)
            self._head.observe(mean, outcome.seconds)

    def _chance(self, match: tuple[int, bool]) -> Chance:
        prior = PRIOR[bisect_left(LENGTHS, match[0])]
        return self._chances.setdefault(match, Chance(prior * PRIOR_TOKENS))


def tree_name(plan: StepPlan) -> str:
    """What the step's trees are counted as: the head's shape, lookups alone, or roots."""
    if any(row.num_draft and not row.draft for row in plan.rows):
        return plan.shape.name
    return NAME if any(row.draft for row in plan.rows) else ROOT.name


def _num_verified(rows: tuple[RowPlan, ...], outcomes: tuple[RowOutcome, ...]) -> int:
    return sum(
        len(row.token_ids) + result.num_draft for row, result in zip(rows, outcomes, strict=True)
    )


def _worth(chance: float, price: float) -> int:
    """How many tokens of a chain are likelier than they are dear: chance ** depth > price."""
    count, reach = 0, chance
    while reach > price and count < MAX_DRAFT:
        count += 1
        reach *= chance
    return count
