"""Aerie beside other servers, over HTTP: `python -m benchmarks.compare`, or `make compare`.

All servers are started and warmed. Then they take turns of a few seconds, for each number of
streams in each round, in an order that changes; one works while the others wait. So a machine that
is slow for a while disturbs all of them alike, and ratios are taken between neighbouring turns. The
same questions go to all, as greedy requests for a fixed number of tokens. A peer that is not
installed, or fails, is named in the results; it is no error.
"""

from __future__ import annotations

import asyncio
import json
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import httpx
import typer

from benchmarks.measuring import machine
from benchmarks.measuring.plots import plot_compare
from benchmarks.peers.agreement import Agreement, agreements
from benchmarks.peers.known import PEERS, Peer, Server, Setting, aerie
from benchmarks.peers.running import free_port, started
from benchmarks.tables import write_results
from configs.host import host_config
from engine.checkpoints.source import BUNDLED_ALIAS, resolve_source
from server.measuring.answers import Answer, Endpoint, ask_all
from server.measuring.timing import Spread
from server.text.chat_codec import load_codec

BASE = "aerie-plain"  # ratios are relative to it
PLAIN = ("speculation.draft=null", "speculation.lookup=false")
OWN = {"aerie": (), BASE: PLAIN}
QUESTIONS = Path(__file__).parent / "data" / "questions.json"
FIGURES = ("tokens_per_second", "ttft", "ttit")
WARM_UP = 16  # tokens
PAUSE = 0.5  # seconds before a turn: threads of the server before may spin for a while
MOST_BUSY = 0.05  # share of all processors that waiting servers may use together


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    streams: tuple[int, ...]
    min_prompts: int  # at each number of streams; rounded up to fill all streams
    num_tokens: int
    rounds: int
    threads: int
    patience: float  # seconds for a server to start

    def prompts(self, questions: Sequence[str], streams: int) -> list[str]:
        """At least `min_prompts`, and as many in the last turn of the streams as before."""
        turns = -(-self.min_prompts // streams)
        return list(islice(cycle(questions), turns * streams))


@dataclass(frozen=True, slots=True)
class Figures:
    """One server with one number of streams in one round; times in milliseconds."""

    tokens_per_second: float
    ttft: float  # median over requests
    ttit: float | None  # median over requests of the mean time per token after the first chunk
    short: int  # answers with fewer tokens than asked for

    @classmethod
    def of(cls, answers: Sequence[Answer], num_tokens: int) -> Figures:
        began = min(answer.sent for answer in answers)
        wall = max(answer.arrivals[-1] for answer in answers) - began
        times = [answer.ttit for answer in answers if answer.ttit is not None]
        return cls(
            tokens_per_second=sum(answer.num_tokens for answer in answers) / wall,
            ttft=statistics.median(answer.ttft for answer in answers) * 1000,
            ttit=statistics.median(times) * 1000 if times else None,
            short=sum(answer.num_tokens < num_tokens for answer in answers),
        )


@dataclass(slots=True)
class Results:
    """What was found so far."""

    figures: dict[tuple[str, int], dict[int, Figures]] = field(default_factory=dict)
    texts: dict[str, dict[str, str]] = field(default_factory=dict)  # by server, by prompt
    notes: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)  # servers

    def take(self, server: str, streams: int, number: int, figures: Figures) -> None:
        self.figures.setdefault((server, streams), {})[number] = figures

    def take_texts(self, server: str, prompts: Sequence[str], answers: Sequence[Answer]) -> None:
        """The first answer to a prompt counts."""
        known = self.texts.setdefault(server, {})
        for prompt, answer in zip(prompts, answers, strict=True):
            known.setdefault(prompt, answer.text)


def main(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Of both servers of Aerie."),
    ] = None,
    model: Annotated[str, typer.Option(help="The bundled alias, or a .gguf file.")] = BUNDLED_ALIAS,
    peers: Annotated[
        str | None, typer.Option(help="Names with commas between; default: all.")
    ] = None,
    peers_dir: Annotated[Path, typer.Option(help="Folder of their environments.")] = Path(
        "build/peers"
    ),
    set_up: Annotated[bool, typer.Option("--set-up", help="Print how to install peers.")] = False,
    streams: Annotated[list[int] | None, typer.Option(help="Requests at a time.")] = None,
    prompts: Annotated[int, typer.Option(min=1)] = 10,
    tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    patience: Annotated[float, typer.Option(help="Seconds for a server to start.")] = 300.0,
    output: Annotated[Path, typer.Option(help="JSON; .md and .png are written beside it.")] = Path(
        "benchmarks/out/compare.json"
    ),
) -> None:
    """Compare Aerie with other servers on this machine."""
    chosen = choose(peers)
    if set_up:
        print("\n".join(peer.set_up(peers_dir) for peer in chosen))
        return
    config = host_config(None, [f"model.source={model}", *(overrides or ())])
    plan = Plan(
        tuple(streams or (1, 8, 32)), prompts, tokens, rounds, config.kernels.threads, patience
    )
    files = resolve_source(model)
    if files.kind != "gguf":
        raise typer.BadParameter(f"{model!r} is not a .gguf file, which llama.cpp needs")
    codec = load_codec(config)
    questions = [
        codec.template.render([{"role": "user", "content": question}], True).text
        for question in json.loads(QUESTIONS.read_text(encoding="utf-8"))
    ]
    results = Results()
    servers = [aerie(name, model, [*fixed, *(overrides or ())]) for name, fixed in OWN.items()]
    servers += present(chosen, peers_dir, results.notes)
    before = machine.load()
    measure_all(servers, questions, plan, files.path, output.parent, results)
    agreed = agreements(results.texts, questions, codec.tokenizer.encode)
    content = contents(plan, servers, results, agreed, model) | {"load": [before, machine.load()]}
    write(output, content)


def choose(names: str | None) -> list[Peer]:
    """The peers of these names. typer.BadParameter for an unknown one."""
    known = {peer.name: peer for peer in PEERS}
    wanted = list(known) if names is None else [name for name in names.split(",") if name]
    for name in wanted:
        if name not in known:
            raise typer.BadParameter(f"peer {name!r} is not known; known are {', '.join(known)}")
    return [known[name] for name in wanted]


def present(chosen: Sequence[Peer], folder: Path, notes: list[str]) -> list[Server]:
    """Those that are installed; the others become notes."""
    servers = []
    for peer in chosen:
        try:
            servers.append(peer.server(folder))
        except RuntimeError as error:
            _note(notes, str(error))
    return servers


def measure_all(
    servers: Sequence[Server],
    questions: Sequence[str],
    plan: Plan,
    gguf: Path,
    folder: Path,
    results: Results,
) -> None:
    """Start all servers, and measure them in turns. One that fails is left out from then on."""
    with ExitStack() as running:
        endpoints: list[Endpoint] = []
        for server in servers:
            print(f"starting {server.name}", flush=True)
            with _failure_noted(server.name, results):
                endpoints.append(running.enter_context(ready(server, plan, gguf, folder)))
        _note_restless(results)
        for number in range(plan.rounds):
            for streams in plan.streams:
                print(f"round {number + 1} of {plan.rounds}, {streams} streams", flush=True)
                prompts = plan.prompts(questions, streams)
                well = [one for one in endpoints if one.name not in results.failed]
                for endpoint in rotated(well, number):
                    with _failure_noted(endpoint.name, results):
                        measure(endpoint, prompts, plan.num_tokens, streams, number, results)


def rotated(endpoints: Sequence[Endpoint], number: int) -> list[Endpoint]:
    """Another order in each round; in every second one backwards, so that no server always follows
    the same one, which leaves the caches and the memory cold or warm."""
    turn = number % len(endpoints) if endpoints else 0
    order = [*endpoints[turn:], *endpoints[:turn]]
    return order[::-1] if number % 2 else order


@contextmanager
def ready(server: Server, plan: Plan, gguf: Path, folder: Path) -> Iterator[Endpoint]:
    """A server that has answered as many requests at a time as it will get."""
    setting = Setting(
        gguf, free_port(), plan.threads, max(plan.streams), (folder / "models").resolve()
    )
    log = folder / f"{server.name}.log"
    with started(server, setting, log, plan.patience) as endpoint:
        warm = [f"Warm up number {i}." for i in range(max(plan.streams))]
        asyncio.run(ask_all(endpoint, warm, WARM_UP, len(warm)))
        yield endpoint


def measure(
    endpoint: Endpoint,
    prompts: Sequence[str],
    num_tokens: int,
    streams: int,
    number: int,
    results: Results,
) -> None:
    """One turn of one server. A short request before it brings back what the system has moved out
    of memory while others worked."""
    time.sleep(PAUSE)
    asyncio.run(ask_all(endpoint, prompts[:1], WARM_UP, 1))
    answers = asyncio.run(ask_all(endpoint, prompts, num_tokens, streams))
    figures = Figures.of(answers, num_tokens)
    print(f"  {endpoint.name}: {figures.tokens_per_second:.1f} tokens/s", flush=True)
    results.take(endpoint.name, streams, number, figures)
    results.take_texts(endpoint.name, prompts, answers)


@contextmanager
def _failure_noted(name: str, results: Results) -> Iterator[None]:
    """Turn what a server fails with into a note, and leave the server out from then on."""
    try:
        yield
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        _note(results.notes, f"{name} failed: {error}")
        results.failed.add(name)


def _note_restless(results: Results) -> None:
    """Servers that only wait must not take time from the one that works."""
    time.sleep(PAUSE)
    if (busy := machine.busy(1.0)) > MOST_BUSY:
        _note(results.notes, f"{busy:.0%} of the processors' time was used before the first turn")


def _note(notes: list[str], text: str) -> None:
    print(text, flush=True)
    notes.append(text)


def contents(
    plan: Plan,
    servers: Sequence[Server],
    results: Results,
    agreed: Sequence[Agreement],
    model: str,
) -> dict[str, object]:
    """Everything that is written."""
    return {
        "benchmark": "compare",
        **machine.facts(),
        "model": model,
        "plan": asdict(plan),
        "base": BASE,
        "servers": {server.name: dict(server.versions) for server in servers},
        "rows": list(_rows(plan, servers, results.figures)),
        "agreement": [asdict(found) for found in agreed],
        "notes": results.notes,
    }


def _rows(
    plan: Plan,
    servers: Sequence[Server],
    figures: Mapping[tuple[str, int], Mapping[int, Figures]],
) -> Iterator[dict[str, object]]:
    for streams in plan.streams:
        base = figures.get((BASE, streams), {})
        for server in servers:
            if found := figures.get((server.name, streams)):
                yield {"streams": streams, "server": server.name, **summary(found, base)}


def summary(found: Mapping[int, Figures], base: Mapping[int, Figures]) -> dict[str, object]:
    """Median and range over rounds; ratios are those of the rounds that both have."""
    spreads: dict[str, object] = {}
    for name in FIGURES:
        values = [v for figures in found.values() if (v := getattr(figures, name)) is not None]
        spreads[name] = asdict(Spread.of(values)) if values else None
    ratios = [
        figures.tokens_per_second / base[number].tokens_per_second
        for number, figures in found.items()
        if number in base
    ]
    return {
        **spreads,
        "ratio": asdict(Spread.of(ratios)) if ratios else None,
        "short": sum(figures.short for figures in found.values()),
        "rounds": len(found),
    }


def write(output: Path, content: Mapping[str, object]) -> None:
    """The JSON, and beside it the table and the picture."""
    write_results("compare", output, content)
    print(f"wrote {output}, and beside it the table; {plot_compare(content, output)}")


def _leave(*_: object) -> None:
    """SIGTERM ends the running server, too, as control-C does."""
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    typer.run(main)
