"""Prompt lookup: drafts the tokens that followed an earlier occurrence of the newest tokens.

Answers repeat their prompt and themselves: names, code, quotations, lists (LLMA, arXiv:2304.04487;
prompt lookup decoding). Such a draft needs no draft head; its only cost is to verify its nodes. The
chance that a token is accepted is learnt from earlier drafts, by the length of the match; the cost
of a node is learnt from step times.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from engine.request import Sequence
from engine.step.plan import DRAFT, RowOutcome, RowPlan, StepOutcome, StepPlan
from engine.step.shape import ROOT

LENGTHS = (2, 3, 4, 6, 8, 12)  # of matches: each has its own chance
WIDTH = 4  # bytes of a token
NAME = "lookup"  # tree name in statistics
MAX_DRAFT = 16  # tokens of one draft
DECAY = 0.98  # weight of the past per observation
PRIOR = (0.5, 0.55, 0.6, 0.7, 0.8, 0.85)  # chance of a token, by length of the match
PRIOR_TOKENS = 8.0  # how many observations the prior stands for
PRIOR_COST = 0.05  # of a node, relative to a step without draft nodes
PROBE_EVERY = 64  # of so many matches that do not pay, one drafts a token as a probe


class TokenText:
    """The tokens of one sequence as bytes. A search needs no index and runs at memory speed: a few
    microseconds for a thousand tokens."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __len__(self) -> int:
        return len(self._bytes) // WIDTH

    def follow(self, token_ids: Tokens[int]) -> None:
        """Append the tokens after those known so far."""
        self._bytes += array("i", token_ids[len(self) :]).tobytes()

    def longest_match(self) -> tuple[int, int]:
        """The length of the longest suffix that occurs earlier, one of `LENGTHS` (0: none), and the
        index after its last earlier occurrence."""
        found = (0, 0)
        for length in LENGTHS:
            if length >= len(self):
                break
            at = self._last_place_of(self._bytes[-length * WIDTH :])
            if at < 0:
                break
            found = (length, at + length)
        return found

    def continued(self, place: int, count: int) -> list[int]:
        """The `count` tokens from `place` on; at the end of the text they repeat from `place`."""
        here = array("i", bytes(self._bytes[place * WIDTH : (place + count) * WIDTH])).tolist()
        while len(here) < count:
            here.append(here[len(here) - (len(self) - place)])
        return here

    def _last_place_of(self, pattern: bytearray) -> int:
        """Token index of the pattern's last occurrence before the newest token; -1 if none."""
        at = self._bytes.rfind(pattern, 0, len(self._bytes) - WIDTH)
        while at >= 0 and at % WIDTH:  # starts inside a token
            at = self._bytes.rfind(pattern, 0, at + len(pattern) - 1)
        return at // WIDTH if at >= 0 else -1


@dataclass(slots=True)
class Chance:
    """Running share of accepted tokens among drafted tokens whose parent was accepted."""

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
        """How many tokens to draft although they seem not to pay: mostly 0, but now and then 1, to
        notice if the chance has improved."""
        self.passed_over = (self.passed_over + 1) % PROBE_EVERY
        return int(self.passed_over == 0)


@dataclass(slots=True)
class StepTime:
    """Model of the time of decode steps: seconds = base + slope * tokens, by least squares with
    decaying weights."""

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
        """Accepted tokens that a node must yield to be worth verifying: its seconds divided by the
        seconds per token of a plain step."""
        spread = self.weight * self.squares - self.tokens**2
        if spread <= 1e-6 * self.squares or self.seconds <= 0:
            return PRIOR_COST * num_rows / (1 + PRIOR_COST * num_rows)
        slope = max(0.0, (self.weight * self.products - self.tokens * self.seconds) / spread)
        base = (self.seconds - slope * self.tokens) / self.weight
        plain = base + slope * num_rows
        return min(1.0, slope * num_rows / plain) if plain > 0 else 1.0


@dataclass(slots=True)
class HeadAcceptance:
    """Accepted tokens of the draft head per row and step, and its share of the time."""

    accepted: float = 0.0
    share: float = 0.0  # time of the head relative to the rest of the step

    def observe(self, accepted: float, seconds: Mapping[str, float]) -> None:
        others = sum(spent for part, spent in seconds.items() if part != DRAFT)
        share = seconds.get(DRAFT, 0.0) / others if others else 0.0
        self.accepted = DECAY * self.accepted + (1 - DECAY) * accepted
        self.share = DECAY * self.share + (1 - DECAY) * share

    def rival(self, num_rows: int) -> float:
        """Accepted tokens above which a lookup is the better draft. With a single row, a lookup
        also saves the head's time."""
        if num_rows > 1:
            return self.accepted
        return (1 + self.accepted) / (1 + self.share) - 1


@dataclass(slots=True)
class Lookup:
    """Drafts for the rows of one scheduler. Only speed depends on it."""

    _texts: dict[int, TokenText] = field(default_factory=dict)  # by line
    _chances: dict[tuple[int, bool], Chance] = field(default_factory=dict)
    _matches: dict[int, tuple[int, bool]] = field(default_factory=dict)  # of the step's drafts
    _time: StepTime = field(default_factory=StepTime)
    _head: HeadAcceptance = field(default_factory=HeadAcceptance)

    def draft(self, seq: Sequence, most: int, num_rows: int, *, has_rival: bool) -> list[int]:
        """A chain of at most `most` tokens after the newest one; empty if no chain seems to pay.

        Args:
            num_rows: rows that decode in this step.
            has_rival: the draft head would draft for this row.
        """
        self._matches.pop(seq.line, None)
        if most < 1:
            return []
        text = self._texts.setdefault(seq.line, TokenText())
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
        self._matches[seq.line] = match
        return text.continued(place, count)

    def withdraw(self, line: int) -> None:
        """The row of a line gets another draft in this step."""
        self._matches.pop(line, None)

    def forget(self, line: int) -> None:
        """Forget a line that its sequence has left."""
        self._texts.pop(line, None)
        self._matches.pop(line, None)

    def observe(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Learn from the accepted tokens and the time of a step."""
        accepted_of_head: list[int] = []
        for row, result in zip(plan.rows, outcome.rows, strict=True):
            if row.draft and row.line in self._matches:
                chance = self._chance(self._matches[row.line])
                chance.observe(result.num_draft, len(result.path))
            elif row.is_drafted:  # counts 0 if the head has failed or knows nothing of the row
                accepted_of_head.append(len(result.path))
        if not plan.only_decodes:
            return  # with prompts in the step, its times say nothing about decoding
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
    """The name under which a step's trees are counted: the head's shape, `lookup` or `root`."""
    if plan.is_drafted:
        return plan.shape.name
    return NAME if any(row.draft for row in plan.rows) else ROOT.name


def _num_verified(rows: tuple[RowPlan, ...], outcomes: tuple[RowOutcome, ...]) -> int:
    return sum(
        len(row.token_ids) + result.num_draft for row, result in zip(rows, outcomes, strict=True)
    )


def _worth(chance: float, price: float) -> int:
    """How many tokens of a chain are worth their price: those with chance ** depth > price."""
    count, reach = 0, chance
    while reach > price and count < MAX_DRAFT:
        count += 1
        reach *= chance
    return count
