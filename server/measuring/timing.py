"""The times that a benchmark records, and the statistics computed from them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """When one request was sent and when each of its tokens arrived, in seconds."""

    sent: float
    tokens: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one batch. Times in milliseconds."""

    ttft: float  # median over requests, time to first token
    ttit_p50: float  # time per output token after the first, over all gaps of all requests
    ttit_p99: float
    tokens_per_second: float  # output tokens of the whole batch, prompt phase included


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range over repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


class Target(Protocol):
    """Something that generates tokens."""

    @property
    def name(self) -> str: ...

    def run(self, prompts: list[list[int]], num_tokens: int) -> list[RequestTimes]:
        """Generate exactly `num_tokens` tokens after each prompt, all prompts at once."""
        ...


def measure(times: Sequence[RequestTimes]) -> Measured:
    """Reduce one run. Each request must have at least two tokens."""
    gaps = sorted(
        (later - earlier) * 1000
        for request in times
        for earlier, later in itertools.pairwise(request.tokens)
    )
    wall = max(request.tokens[-1] for request in times) - min(request.sent for request in times)
    return Measured(
        ttft=statistics.median((request.tokens[0] - request.sent) * 1000 for request in times),
        ttit_p50=percentile(gaps, 0.50),
        ttit_p99=percentile(gaps, 0.99),
        tokens_per_second=sum(len(request.tokens) for request in times) / wall,
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of the ordered values do not exceed (nearest rank)."""
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]
