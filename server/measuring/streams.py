"""A server at so many requests at a time: times and tokens per second, as its clients see them."""

from __future__ import annotations

import asyncio
import random
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import httpx

from server.measuring.answers import Answer, Endpoint, ask_all
from server.measuring.open_load import TEXT
from server.measuring.timing import percentile

DRAFTS = re.compile(
    r"^aerie:spec_decode_num_(drafts|accepted_tokens)_total\S* (\S+)$", re.MULTILINE
)
METRICS_TIMEOUT = 5.0  # seconds
WARM_UP = 2  # answers


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked at each number of streams."""

    streams: tuple[int, ...]  # requests at a time
    requests: int  # least number of requests at each
    prompt_words: int
    output_tokens: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("requests", "prompt_words", "output_tokens"):
            if getattr(self, name) < (2 if name == "output_tokens" else 1):
                raise ValueError(f"{name} is {getattr(self, name)}, which is too small")
        if not self.streams or min(self.streams) < 1:
            raise ValueError(f"streams are {self.streams}; each must be at least 1")


@dataclass(frozen=True, slots=True)
class Row:
    """Times in milliseconds. None where a server sends whole answers, or tells nothing."""

    streams: int
    requests: int
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float | None  # mean time per token after the first, of each answer
    tpot_p99: float | None
    itl_p99: float | None  # time from one arrival to the next, which may bring several tokens
    tokens_per_second: float
    tokens_per_step: float | None  # of verified drafts, the model's own token included


async def measure(endpoint: Endpoint, plan: Plan, say: Callable[[Row], object]) -> list[Row]:
    """A row for each number of streams; `say` gets each when it is known. Raises as
    `Endpoint.ask`."""
    draw = random.Random(plan.seed)
    prompts = pieces(plan.prompt_words, draw)
    await ask_all(endpoint, [next(prompts) for _ in range(WARM_UP)], plan.output_tokens, 1)
    rows: list[Row] = []
    for streams in plan.streams:
        # Whole waves, so that the number of open requests is the wanted one nearly to the end.
        number = -(-max(plan.requests, 2 * streams) // streams) * streams
        asked = [next(prompts) for _ in range(number)]
        before = await drafts(endpoint)
        answers = await ask_all(endpoint, asked, plan.output_tokens, streams)
        after = await drafts(endpoint)
        rows.append(summary(streams, answers, accepted(before, after)))
        say(rows[-1])
    return rows


def pieces(num_words: int, draw: random.Random) -> Iterator[str]:
    """Pieces of a text, which begin at different words, so that no prefix cache helps."""
    words = TEXT.read_text(encoding="utf-8").split()
    while True:
        first = draw.randrange(len(words))
        yield " ".join((words[first:] + words * (num_words // len(words) + 1))[:num_words])


def summary(streams: int, answers: Sequence[Answer], tokens_per_step: float | None) -> Row:
    firsts = sorted(answer.ttft * 1000 for answer in answers)
    means = sorted(answer.ttit * 1000 for answer in answers if answer.ttit is not None)
    gaps = sorted(
        (later - earlier) * 1000
        for answer in answers
        for earlier, later in pairwise(answer.arrivals)
    )
    seconds = max(answer.arrivals[-1] for answer in answers) - min(a.sent for a in answers)
    return Row(
        streams=streams,
        requests=len(answers),
        ttft_p50=statistics.median(firsts),
        ttft_p99=percentile(firsts, 0.99),
        tpot_p50=statistics.median(means) if means else None,
        tpot_p99=percentile(means, 0.99) if means else None,
        itl_p99=percentile(gaps, 0.99) if gaps else None,
        tokens_per_second=sum(answer.num_tokens for answer in answers) / max(seconds, 1e-9),
        tokens_per_step=tokens_per_step,
    )


Counts = dict[str, float]


async def drafts(endpoint: Endpoint) -> Counts:
    """Aerie's counts of drafts so far; nothing from other servers."""
    url = endpoint.base_url.removesuffix("/v1") + "/metrics"
    async with endpoint.client() as client:
        try:
            answer = await client.get(url, timeout=METRICS_TIMEOUT)
        except httpx.HTTPError:
            return {}
    return {name: float(value) for name, value in DRAFTS.findall(answer.text)}


def accepted(before: Counts, after: Counts) -> float | None:
    """Mean tokens of the steps with drafts in between; None if there were none."""
    number = after.get("drafts", 0.0) - before.get("drafts", 0.0)
    tokens = after.get("accepted_tokens", 0.0) - before.get("accepted_tokens", 0.0)
    return 1 + tokens / number if number > 0 else None


def run(endpoint: Endpoint, plan: Plan, say: Callable[[Row], object]) -> list[Row]:
    """`measure`, for callers without an event loop."""
    return asyncio.run(measure(endpoint, plan, say))
