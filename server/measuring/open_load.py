"""A server under open load.

Requests arrive at random (Poisson) whether or not earlier ones are answered, at one rate after the
other. A request is good if its first token and each token after it come in time; goodput counts
good requests per second. Saturation is the rate at which the share of good ones falls below a goal.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import httpx

from server.measuring.answers import Answer, Endpoint, ask_all
from server.measuring.timing import percentile

TEXT = Path(__file__).parent / "alice.txt"
WARM_UP = 4  # requests at a time


@dataclass(frozen=True, slots=True)
class Goal:
    """The service-level objective."""

    ttft: float  # ms, time to the first token
    ttit: float  # ms, mean time per token after it
    share: float  # of the requests that must be good

    def met_by(self, answer: Answer) -> bool:
        """A single chunk has no time per token."""
        in_time = answer.ttit is None or answer.ttit * 1000 <= self.ttit
        return answer.ttft * 1000 <= self.ttft and in_time


@dataclass(frozen=True, slots=True)
class Plan:
    """The load. Sizes are drawn evenly between their bounds."""

    rates: tuple[float, ...]  # requests per second, rising
    seconds: float  # of arrivals at each rate
    drain: float  # seconds for the last requests; those that take longer are not good
    prompt_words: tuple[int, int]
    output_tokens: tuple[int, int]
    seed: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, `at` seconds after the start."""

    at: float
    prompt: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """What happened at one rate; times in milliseconds, None where no request was answered."""

    rate: float
    requests: int
    answered: int
    good: float  # share of all requests
    goodput: float  # good requests per second of arrivals
    ttft_p50: float | None
    ttft_p99: float | None
    ttit_p50: float | None
    ttit_p99: float | None
    tokens_per_second: float  # of answered requests, from the first arrival to the last answer
    errors: tuple[str, ...]  # different ones


def check(plan: Plan) -> None:
    """ValueError, which names the value, for a load that cannot be made."""
    rising = all(slower < faster for slower, faster in pairwise(plan.rates))
    if plan.rates[0] <= 0 or not rising:
        raise ValueError(f"rates are {plan.rates}; they must be above 0 and rise")
    for name in ("prompt_words", "output_tokens"):
        least, most = getattr(plan, name)
        if not 1 <= least <= most:
            raise ValueError(f"{name} is {least} {most}; it must be 1 <= least <= most")


def arrivals(plan: Plan, rate: float) -> list[Arrival]:
    """A Poisson process, the same for equal plans; at least one request. Prompts begin at random
    words of a text, so that they rarely share a beginning."""
    draw = random.Random(f"{plan.seed} {rate}")
    words = TEXT.read_text(encoding="utf-8").split()
    found: list[Arrival] = []
    at = 0.0
    while at < plan.seconds or not found:
        length = draw.randint(*plan.prompt_words)
        first = draw.randrange(max(1, len(words) - length))
        prompt = " ".join(words[first : first + length])
        found.append(Arrival(at, prompt, draw.randint(*plan.output_tokens)))
        at += draw.expovariate(rate)
    return found


async def measure(
    endpoint: Endpoint, plan: Plan, goal: Goal, say: Callable[[Row], object]
) -> list[Row]:
    """One row per rate, until half of the requests or more are not good; `say` gets each."""
    await ask_all(endpoint, ["Warm up."] * WARM_UP, plan.output_tokens[0], WARM_UP)
    rows: list[Row] = []
    for rate in plan.rates:
        rows.append(await measure_rate(endpoint, plan, goal, rate))
        say(rows[-1])
        if rows[-1].good <= 0.5:
            break
    return rows


async def measure_rate(endpoint: Endpoint, plan: Plan, goal: Goal, rate: float) -> Row:
    """Send all requests of one rate, each at its time."""
    planned = arrivals(plan, rate)
    async with endpoint.client() as client:
        start = time.perf_counter()
        tasks = []
        for arrival in planned:
            await asyncio.sleep(start + arrival.at - time.perf_counter())
            asked = endpoint.ask(client, arrival.prompt, arrival.num_tokens)
            tasks.append(asyncio.create_task(asked))
        _, late = await asyncio.wait(tasks, timeout=plan.drain)
        for task in late:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    return summary(rate, planned, results, goal, plan.seconds)


def summary(
    rate: float,
    planned: Sequence[Arrival],
    results: Sequence[Answer | BaseException],
    goal: Goal,
    seconds: float,
) -> Row:
    """Raises an exception among `results` that is neither an error of HTTP nor a late request."""
    answers = [result for result in results if isinstance(result, Answer)]
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in errors:
        if not isinstance(error, asyncio.CancelledError | httpx.HTTPError | RuntimeError):
            raise error
    good = sum(goal.met_by(answer) for answer in answers)
    firsts = sorted(answer.ttft * 1000 for answer in answers)
    times = sorted(answer.ttit * 1000 for answer in answers if answer.ttit is not None)
    return Row(
        rate=rate,
        requests=len(planned),
        answered=len(answers),
        good=good / len(planned),
        goodput=good / seconds,
        ttft_p50=statistics.median(firsts) if firsts else None,
        ttft_p99=percentile(firsts, 0.99) if firsts else None,
        ttit_p50=statistics.median(times) if times else None,
        ttit_p99=percentile(times, 0.99) if times else None,
        tokens_per_second=_throughput(answers),
        errors=tuple(sorted({_reason(error) for error in errors})),
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "not answered in time"
    return str(error) or type(error).__name__


def _throughput(answers: Sequence[Answer]) -> float:
    if not answers:
        return 0.0
    first = min(answer.sent for answer in answers)
    last = max(answer.arrivals[-1] for answer in answers)
    return sum(answer.num_tokens for answer in answers) / (last - first)


def saturation(rows: Sequence[Row], share: float) -> float | None:
    """The rate at which the share of good requests falls below `share`, between two measured rates
    on a straight line; None if it does not, the first rate if that is too much already."""
    if rows[0].good < share:
        return rows[0].rate
    for before, after in pairwise(rows):
        if after.good < share:
            part = (before.good - share) / (before.good - after.good)
            return before.rate + part * (after.rate - before.rate)
    return None


def run(endpoint: Endpoint, plan: Plan, goal: Goal, say: Callable[[Row], object]) -> list[Row]:
    """`measure`, for callers without an event loop."""
    return asyncio.run(measure(endpoint, plan, goal, say))
