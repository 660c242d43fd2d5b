"""Learns what prompt tokens cost, so that prompts computed beside running streams take no longer
than these streams may wait for their next token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.step.plan import StepPlan

DECAY = 0.95  # weight of the past per observed step
MIN_STEPS = 3  # of each kind, before anything is predicted
LEAST_CHUNK = 16  # prompt tokens that a step computes at least
SURPRISE = 4.0  # a step that took longer counts as so many times what was predicted


@dataclass(slots=True)
class Sums:
    """Weighted sums for a fit of seconds = token * T + pair * A, with T the prompt tokens of a step
    and A their pairs with tokens before them."""

    tt: float = 0.0
    ta: float = 0.0
    aa: float = 0.0
    ts: float = 0.0
    as_: float = 0.0

    def add(self, tokens: float, pairs: float, seconds: float) -> None:
        self.tt = DECAY * self.tt + tokens * tokens
        self.ta = DECAY * self.ta + tokens * pairs
        self.aa = DECAY * self.aa + pairs * pairs
        self.ts = DECAY * self.ts + tokens * seconds
        self.as_ = DECAY * self.as_ + pairs * seconds

    def fit(self) -> tuple[float, float]:
        """Seconds per token and per pair, neither negative."""
        spread = self.tt * self.aa - self.ta * self.ta
        if spread > 1e-6 * self.tt * self.aa:
            token = (self.ts * self.aa - self.as_ * self.ta) / spread
            pair = (self.as_ * self.tt - self.ts * self.ta) / spread
            if token >= 0 and pair >= 0:
                return token, pair
            if token < 0:
                return 0.0, max(0.0, self.as_ / self.aa)
        return max(0.0, self.ts / self.tt), 0.0


class StepTimes:
    """Running estimate of the time of a step by its prompt tokens and their context. The first step
    of each kind does not count: kernels may have been compiled in it."""

    def __init__(self) -> None:
        self._sums = Sums()
        self._decode = 0.0  # seconds of a step without prompt tokens
        self._num_decode = self._num_prompt = 0
        self._per_token = self._per_pair = 0.0

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Learn from a step that took so long."""
        tokens, pairs = prompt_work(plan)
        if tokens == 0:
            self._observe_decode(seconds)
            return
        self._num_prompt += 1
        if self._num_prompt == 1:
            return
        seconds = min(seconds, self._most_believed(tokens, pairs))
        self._sums.add(tokens, pairs, max(0.0, seconds - self._decode))
        self._per_token, self._per_pair = self._sums.fit()

    def room(self, goal: float) -> float | None:
        """Seconds that prompts may add to a step beside decoding rows: what these leave of the
        `goal`, but at least as long as they take themselves, so that prompts get half of the time
        however hard the goal is. None while too little is known."""
        if min(self._num_decode, self._num_prompt) <= MIN_STEPS:
            return None
        return max(goal - self._decode, self._decode)

    def cost(self, num_tokens: int, context: int) -> float:
        """Seconds that `num_tokens` prompt tokens take after `context` others."""
        return self._per_token * num_tokens + self._per_pair * pairs_of(num_tokens, context)

    def affordable(self, seconds: float, context: int) -> int:
        """The most prompt tokens after `context` others that take no longer than `seconds`; a very
        large number if they cost nothing."""
        if seconds <= 0:
            return 0
        # per_pair / 2 * n^2 + linear * n = seconds, in a form without cancellation
        linear = self._per_token + self._per_pair * (context + 0.5)
        root = math.sqrt(linear * linear + 2 * self._per_pair * seconds)
        return int(2 * seconds / (linear + root)) if linear + root > 0 else 1 << 30

    def _observe_decode(self, seconds: float) -> None:
        self._num_decode += 1
        if self._num_decode == 1:
            return
        if self._num_decode > MIN_STEPS + 1:
            seconds = min(seconds, SURPRISE * self._decode)
        share = max(1 - DECAY, 1 / (self._num_decode - 1))
        self._decode += share * (seconds - self._decode)

    def _most_believed(self, tokens: int, pairs: float) -> float:
        if self._num_prompt <= MIN_STEPS + 1:
            return math.inf
        predicted = self._decode + self._per_token * tokens + self._per_pair * pairs
        return SURPRISE * predicted


class PromptTime:
    """The time that one step has for prompt tokens. The first chunk gets at least `LEAST_CHUNK`
    tokens, however little time there is, so that no prompt stands still."""

    def __init__(self, times: StepTimes, seconds: float) -> None:
        self._times = times
        self._seconds = seconds
        self._is_fresh = True

    @property
    def is_left(self) -> bool:
        """Whether there is time for `LEAST_CHUNK` more tokens, or none was spent."""
        return self._is_fresh or self._seconds >= self._times.cost(LEAST_CHUNK, 0)

    def spend(self, wanted: int, context: int) -> int:
        """How many of the `wanted` tokens after `context` others there is time for."""
        count = min(wanted, self._times.affordable(self._seconds, context))
        if count < min(wanted, LEAST_CHUNK):
            count = min(wanted, LEAST_CHUNK) if self._is_fresh else 0
        if count:
            self._is_fresh = False
            self._seconds -= self._times.cost(count, context)
        return count


def prompt_work(plan: StepPlan) -> tuple[int, float]:
    """Prompt tokens of a step, and their pairs with the tokens up to each."""
    tokens, pairs = 0, 0.0
    for row in plan.rows:
        if len(row.token_ids) > 1 or not row.samples:
            tokens += len(row.token_ids)
            pairs += pairs_of(len(row.token_ids), row.start)
    return tokens, pairs


def pairs_of(num_tokens: int, context: int) -> float:
    """Pairs of `num_tokens` tokens after `context` others with the tokens that each attends to."""
    return num_tokens * (context + (num_tokens + 1) / 2)
