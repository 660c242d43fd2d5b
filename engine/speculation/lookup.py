"""Prompt lookup: drafts the tokens that followed an earlier occurrence of the newest tokens, or
those that the client predicted.

Answers repeat their prompt and themselves: names, code, quotations, lists (LLMA, arXiv:2304.04487;
prompt lookup decoding). Such a draft needs no draft head; its only cost is to verify its nodes. The
chance that a token is accepted is learnt from earlier drafts, by the length of the match; what a
node costs, and what the draft head promises instead, comes from the planner.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.request import Sequence
from engine.speculation.prediction import Prediction
from engine.step.plan import StepOutcome, StepPlan
from engine.step.shape import MAX_NODES, ROOT

LENGTHS = (2, 3, 4, 6, 8, 12)  # of matches: each has its own chance
WIDTH = 4  # bytes of a token
NAME = "lookup"  # tree name in statistics
MAX_DRAFT = 16  # tokens of one draft
DECAY = 0.98  # weight of the past per observation
PRIOR = (0.5, 0.55, 0.6, 0.7, 0.8, 0.85)  # chance of a token, by length of the match
LOST, SURE = -2, -1  # in place of a length: a prediction was just found again, or is followed
PRIORS = dict(zip(LENGTHS, PRIOR, strict=True)) | {LOST: 0.6, SURE: 0.9}
MAX_PREDICTED = MAX_NODES - 1  # tokens of a draft from a prediction
PRIOR_TOKENS = 8.0  # how many observations the prior stands for
HOPELESS = 0.95  # at this price of a node, hardly any chance would do
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


class Found(NamedTuple):
    """A draft."""

    tokens: tuple[int, ...]
    promise: float  # accepted tokens, less the price of all; infinite if it is to be tried anyway


NOTHING = Found((), 0.0)


class Stakes(NamedTuple):
    """What a draft costs and competes with, see `Lookup.draft`."""

    price: float
    rival: float
    may_try: bool


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
class Lookup:
    """Drafts for the rows of one scheduler. Only speed depends on it."""

    _texts: dict[int, TokenText] = field(default_factory=dict)  # by line
    _predictions: dict[int, Prediction] = field(default_factory=dict)
    _chances: dict[tuple[int, bool], Chance] = field(default_factory=dict)
    _matches: dict[int, tuple[int, bool]] = field(default_factory=dict)  # of the step's drafts

    def draft(
        self,
        seq: Sequence,
        most: int,
        price: float,
        rival: float = 0.0,
        *,
        may_try: bool = True,
    ) -> Found:
        """A chain of at most `most` tokens after the newest one; empty if no chain seems to pay.

        Args:
            price: accepted tokens that a node must yield to be worth verifying.
            rival: accepted tokens, less their price, that the draft head promises for this row.
            may_try: now and then, a token is drafted although it does not seem to pay.
        """
        self._matches.pop(seq.line, None)
        if most < 1 or price >= HOPELESS:
            return NOTHING
        stakes = Stakes(price, rival, may_try)
        predicted = self._predicted(seq, most, stakes)
        return predicted if predicted.tokens else self._repeated(seq, most, stakes)

    def drafts(self, line: int) -> bool:
        """Whether the newest draft of a line was looked up."""
        return line in self._matches

    def is_predicted(self, line: int) -> bool:
        """Whether the newest draft of a line is from the prediction of its request."""
        return self._matches.get(line, (0, False))[0] < 0

    def _predicted(self, seq: Sequence, most: int, stakes: Stakes) -> Found:
        """What the client predicted, where the text has come in it."""
        if not seq.request.prediction:
            return NOTHING
        known = self._predictions.get(seq.line)
        if known is None:
            known = self._predictions[seq.line] = Prediction(seq.request.prediction)
        known.follow(seq.token_ids, seq.num_prompt)
        rest = known.rest(min(most, MAX_PREDICTED))
        match = (SURE if known.is_sure else LOST, seq.request.params.temperature > 0)
        count, promise = self._count(seq.line, match, len(rest), stakes)
        return Found(tuple(rest[:count]), promise)

    def _repeated(self, seq: Sequence, most: int, stakes: Stakes) -> Found:
        """What followed earlier in the text."""
        text = self._texts.setdefault(seq.line, TokenText())
        text.follow(seq.token_ids)
        length, place = text.longest_match()
        if length == 0:
            return NOTHING
        match = (length, seq.request.params.temperature > 0)
        count, promise = self._count(seq.line, match, min(most, MAX_DRAFT), stakes)
        return Found(tuple(text.continued(place, count)), promise) if count else NOTHING

    def _count(
        self, line: int, match: tuple[int, bool], most: int, stakes: Stakes
    ) -> tuple[int, float]:
        """How many tokens to draft after a match, and their `Found.promise`; the match is noted as
        that of the line's draft."""
        if most < 1:
            return 0, 0.0
        known, price = self._chance(match), stakes.price
        chance = known.value
        count = _worth(chance, price, most)
        promise = sum(chance**depth - price for depth in range(1, count + 1))
        if count < 1 or promise <= stakes.rival:
            count, promise = known.probe() if stakes.may_try else 0, math.inf
        if count < 1:
            return 0, 0.0
        self._matches[line] = match
        return count, promise

    def withdraw(self, line: int) -> None:
        """The row of a line gets another draft in this step."""
        self._matches.pop(line, None)

    def forget(self, line: int) -> None:
        """Forget a line that its sequence has left."""
        self._texts.pop(line, None)
        self._predictions.pop(line, None)
        self._matches.pop(line, None)

    def observe(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Learn from the accepted tokens of a step."""
        for row, result in zip(plan.rows, outcome.rows, strict=True):
            if row.draft and row.line in self._matches:
                chance = self._chance(self._matches[row.line])
                chance.observe(result.num_draft, len(result.path))

    def _chance(self, match: tuple[int, bool]) -> Chance:
        return self._chances.setdefault(match, Chance(PRIORS[match[0]] * PRIOR_TOKENS))


def tree_name(plan: StepPlan) -> str:
    """The name under which a step's trees are counted: the head's shape, `lookup` or `root`."""
    if plan.is_drafted:
        return plan.shape.name
    return NAME if any(row.draft for row in plan.rows) else ROOT.name


def _worth(chance: float, price: float, most: int) -> int:
    """How many tokens of a chain, at most `most`, are worth their price: those with
    chance ** depth > price."""
    count, reach = 0, chance
    while reach > price and count < most:
        count += 1
        reach *= chance
    return count
