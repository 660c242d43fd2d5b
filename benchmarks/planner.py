"""What `speculation.tree=auto` gains and loses: `python -m benchmarks.planner`.

Engines that decode plainly, with the planner, and with fixed trees are in this process and take
turns, in another order in every round, so that a noisy machine disturbs all alike. Ratios are taken
within each round. Traffic: the prompts of every file greedily, those of the first at temperature 1,
and all of them mixed, every second stream at temperature 0.7.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.measuring import machine
from benchmarks.tables import write_results
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

AUTO, PLAIN = "auto", "plain"
PLAIN_SETTINGS = ("speculation.draft=null", "speculation.tree=root", "speculation.lookup=false")
STREAMS = (1, 4, 8, 16, 32)
REQUESTS = 8  # of a turn, at least: few streams answer several requests each

Rates = dict[tuple[str, str, int], list[float]]  # tokens/s by traffic, engine, streams; of rounds


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of one kind; stream i has the i-th temperature, in turn."""

    name: str
    prompts: Sequence[list[int]]
    temperatures: tuple[float, ...] = (0.0,)

    def batch(self, size: int, tokens: int, turn: int) -> list[Request]:
        """The same requests for every engine; other prompts in every turn."""
        return [
            Request(
                request_id=f"{self.name}-{turn}-{size}-{at}",
                prompt_ids=self.prompts[(turn * size + at) % len(self.prompts)],
                params=SamplingParams(
                    max_tokens=tokens,
                    temperature=self.temperatures[at % len(self.temperatures)],
                    seed=at,
                    ignore_eos=True,
                ),
            )
            for at in range(size)
        ]


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="As for `aerie serve`.")] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="JSONL; default: those of the package.")
    ] = None,
    fixed: Annotated[list[str] | None, typer.Option(help="Trees to compare with.")] = None,
    streams: Annotated[list[int] | None, typer.Option(help="Numbers of streams.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path, typer.Option(help="JSON; the table is written beside it.")] = Path(
        "benchmarks/out/planner.json"
    ),
) -> None:
    """Compare the planner with plain decoding and with fixed trees."""
    settings = {PLAIN: PLAIN_SETTINGS, AUTO: ()} | {
        tree: (f"speculation.tree={tree}",) for tree in fixed or ()
    }
    configs = {
        name: host_config(config, [*(overrides or ()), *own]) for name, own in settings.items()
    }
    traffic = kinds_of_traffic(configs[PLAIN], prompts or [sample_prompts()])
    engines = {name: OfflineEngine(build_engine(each)) for name, each in configs.items()}
    sizes, before = tuple(streams or STREAMS), machine.load()
    rates = run_rounds(engines, traffic, sizes, tokens, rounds)
    content = {
        "benchmark": "planner",
        **machine.facts(),
        "model": configs[PLAIN].model.source,
        "tokens": tokens,
        "rounds": rounds,
        "load": [before, machine.load()],
        "rows": list(rows(rates)),
    }
    write_results("planner", output, content)
    print(f"wrote {output}")


def kinds_of_traffic(config: HostConfig, files: Sequence[Path]) -> list[Traffic]:
    codec = load_codec(config)
    found = {
        file.stem: [codec.encode(list(prompt.messages), True) for prompt in read_prompts(file)]
        for file in files
    }
    first = files[0].stem
    rounds = chain.from_iterable(zip_longest(*found.values()))
    return [
        *(Traffic(f"{name}, T 0", prompts) for name, prompts in found.items()),
        Traffic(f"{first}, T 1", found[first], (1.0,)),
        Traffic("mixed", [prompt for prompt in rounds if prompt], (0.0, 0.7)),
    ]


def run_rounds(
    engines: Mapping[str, OfflineEngine],
    traffic: Sequence[Traffic],
    sizes: Sequence[int],
    tokens: int,
    rounds: int,
) -> Rates:
    """The first round only warms up."""
    rates: Rates = {}
    for turn in range(rounds + 1):
        print(f"round {turn} of {rounds}" if turn else "warming up", flush=True)
        for kind in traffic:
            for size in sizes:
                for name in sorted(engines, reverse=turn % 2 == 1):
                    rate = tokens_per_second(engines[name], kind, size, tokens, turn)
                    if turn:
                        rates.setdefault((kind.name, name, size), []).append(rate)
    return rates


def tokens_per_second(
    engine: OfflineEngine, kind: Traffic, size: int, tokens: int, turn: int
) -> float:
    """Of as many batches as make `REQUESTS`; prompts are not counted."""
    times = -(-REQUESTS // size)
    parts = [decode(engine, kind.batch(size, tokens, turn * times + at)) for at in range(times)]
    return sum(count for count, _ in parts) / sum(seconds for _, seconds in parts)


def decode(engine: OfflineEngine, requests: Sequence[Request]) -> tuple[int, float]:
    """Tokens and seconds after the first token of the last stream."""
    missing = {request.request_id for request in requests}
    count, began = 0, 0.0
    for events in engine.steps(requests):
        emitted = [event for event in events if isinstance(event, Tokens)]
        if not missing:
            count += sum(len(event.token_ids) for event in emitted)
            continue
        missing -= {event.request_id for event in emitted}
        began = time.perf_counter()
    return count, time.perf_counter() - began


def rows(rates: Rates) -> Iterator[dict[str, object]]:
    """Each engine beside plain decoding, round by round."""
    for (kind, name, size), own in rates.items():
        plain = rates[kind, PLAIN, size]
        if name != PLAIN:
            ratio = Spread.of([a / b for a, b in zip(own, plain, strict=True)])
            yield {
                "traffic": kind,
                "streams": size,
                "tree": name,
                "plain": asdict(Spread.of(plain)),
                "tokens_per_second": asdict(Spread.of(own)),
                "ratio": asdict(ratio),
            }


if __name__ == "__main__":
    typer.run(main)
