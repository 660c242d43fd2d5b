"""Aerie beside other servers, over HTTP: `python -m benchmarks.compare`, or `make compare`.

Every server is started, warmed, measured at each number of streams and stopped, one after the
other; then comes the next round, in another order. So a noisy machine disturbs all of them alike,
and ratios are taken within a round. The same questions go to all, as greedy requests for a fixed
number of tokens. A peer that is not installed, or fails, is named in the results; it is no error.
"""

from __future__ import annotations

import asyncio
import json
import signal
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import httpx
import typer

from benchmarks import machine
from benchmarks.agreement import Agreement, agreements
from benchmarks.peers.known import PEERS, Peer, Server, Setting, aerie
from benchmarks.plots import plot_compare
from benchmarks.running import free_port, started
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

    def take(self, server: str, streams: int, number: int, figures: Figures) -> None:
        self.figures.setdefault((server, streams), {})[number] = figures

    def take_texts(self, server: str, prompts: Sequence[str], answers: Sequence[Answer]) -> None:
        """The first answer to a prompt counts."""
        known = self.texts.setdefault(server, {})
        for prompt, answer in zip(prompts, answers, strict=True):
            known.setdefault(prompt, answer.text)


Start = Callable[[Server], Iterator[Endpoint]]


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
    """All rounds; the order of the servers rotates. One that fails is left out from then on."""
    well = list(servers)
    for number in range(plan.rounds):
        turn = number % len(well) if well else 0
        for server in [*well[turn:], *well[:turn]]:
            print(f"round {number + 1} of {plan.rounds}: {server.name}", flush=True)
            try:
                measure_one(server, questions, plan, gguf, folder, number, results)
            except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
                _note(results.notes, f"{server.name} failed in round {number + 1}: {error}")
                well.remove(server)


def measure_one(
    server: Server,
    questions: Sequence[str],
    plan: Plan,
    gguf: Path,
    folder: Path,
    number: int,
    results: Results,
) -> None:
    """Start, warm, measure, stop."""
    port, scratch = free_port(), (folder / "models").resolve()
    setting = Setting(gguf, port, plan.threads, max(plan.streams), scratch)
    log = folder / f"{server.name}.log"
    with started(server, setting, log, plan.patience) as endpoint:
        warm = [f"Warm up number {i}." for i in range(max(plan.streams))]
        asyncio.run(ask_all(endpoint, warm, WARM_UP, len(warm)))
        for streams in plan.streams:
            prompts = plan.prompts(questions, streams)
            answers = asyncio.run(ask_all(endpoint, prompts, plan.num_tokens, streams))
            figures = Figures.of(answers, plan.num_tokens)
            print(f"  {streams} streams: {figures.tokens_per_second:.1f} tokens/s", flush=True)
            results.take(server.name, streams, number, figures)
            results.take_texts(server.name, prompts, answers)


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
