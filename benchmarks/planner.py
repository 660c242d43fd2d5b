"""Decoding with the configured drafts against plain decoding, by number of streams.

Both engines are in this process and take turns, in another order in every round, so that a noisy
machine disturbs both alike. Ratios are taken within each round. Prompts are those that come with
the package; half of the streams are sampled.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from configs.host import host_config
from configs.resolve import HostConfig
from drafter.train.data.conversations import read_prompts
from engine.messages import Tokens
from engine.request import Request, SamplingParams
from server.assembly.compose import build_engine
from server.assembly.heads.evaluation import sample_prompts
from server.assembly.offline import OfflineEngine
from server.measuring.timing import Spread
from server.text.chat_codec import load_codec

DRAFTED, PLAIN = "drafted", "plain"
PLAIN_SETTINGS = ("speculation.draft=null", "speculation.tree=root", "speculation.lookup=false")
STREAMS = (1, 4, 8, 16, 32)

# Tokens per second of every round, by engine and number of streams.
Rates = dict[tuple[str, int], list[float]]


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="As for `aerie serve`.")] = None,
    streams: Annotated[list[int] | None, typer.Option(help="Numbers of streams.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of each stream.")] = 96,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Print tokens per second with drafts relative to plain decoding: median, least and most over
    the rounds."""
    drafted = host_config(config, overrides or ())
    plain = host_config(config, [*(overrides or ()), *PLAIN_SETTINGS])
    engines = {DRAFTED: _engine(drafted), PLAIN: _engine(plain)}
    sizes = tuple(streams or STREAMS)
    rates = run_rounds(engines, _prompts(drafted), sizes, tokens, rounds)
    Console().print(table(ratios(rates, sizes), rates))


def run_rounds(
    engines: Mapping[str, OfflineEngine],
    prompts: Sequence[list[int]],
    sizes: Sequence[int],
    tokens: int,
    rounds: int,
) -> Rates:
    """The first round only warms up."""
    rates: Rates = {(name, size): [] for name in engines for size in sizes}
    for turn in range(rounds + 1):
        for size in sizes:
            for name in sorted(engines, reverse=turn % 2 == 1):
                rate = tokens_per_second(engines[name], _batch(prompts, size, tokens, turn))
                if turn:
                    rates[name, size].append(rate)
    return rates


def tokens_per_second(engine: OfflineEngine, requests: Sequence[Request]) -> float:
    """After the first token of the last stream: prompts are not counted."""
    missing = {request.request_id for request in requests}
    count, began = 0, 0.0
    for events in engine.steps(requests):
        emitted = [event for event in events if isinstance(event, Tokens)]
        if not missing:
            count += sum(len(event.token_ids) for event in emitted)
            continue
        missing -= {event.request_id for event in emitted}
        began = time.perf_counter()
    return count / (time.perf_counter() - began)


def ratios(rates: Rates, sizes: Sequence[int]) -> dict[int, Spread]:
    """Drafted relative to plain, round by round."""
    return {
        size: Spread.of(
            [a / b for a, b in zip(rates[DRAFTED, size], rates[PLAIN, size], strict=True)]
        )
        for size in sizes
    }


def table(found: Mapping[int, Spread], rates: Rates) -> Table:
    columns = ("streams", "plain tok/s", "drafted tok/s", "ratio", "least", "most")
    shown = Table(*columns, title="drafted relative to plain decoding, medians over rounds")
    for size, spread in found.items():
        own = (Spread.of(rates[name, size]).median for name in (PLAIN, DRAFTED))
        values = (spread.median, spread.low, spread.high)
        shown.add_row(str(size), *(f"{rate:.0f}" for rate in own), *(f"{x:.3f}" for x in values))
    return shown


def _batch(prompts: Sequence[list[int]], size: int, tokens: int, turn: int) -> list[Request]:
    """The same requests for every engine; other prompts in every round."""
    return [
        Request(
            request_id=f"stream-{turn}-{size}-{at}",
            prompt_ids=prompts[(turn * size + at) % len(prompts)],
            params=SamplingParams(
                max_tokens=tokens, temperature=0.7 * (at % 2), seed=at, ignore_eos=True
            ),
        )
        for at in range(size)
    ]


def _prompts(config: HostConfig) -> list[list[int]]:
    codec = load_codec(config)
    return [codec.encode(list(prompt.messages), True) for prompt in read_prompts(sample_prompts())]


def _engine(config: HostConfig) -> OfflineEngine:
    return OfflineEngine(build_engine(config))


if __name__ == "__main__":
    typer.run(main)
