"""Decode latency of Aerie, transformers and any OpenAI-compatible server, in one run.

Every batch size is measured `--repeats` times, and the targets take turns within each repeat, so
that a noisy machine disturbs all of them alike. Ratios are taken within each repeat; their median
is reported. Prompts are random token ids, new for every repeat, so that no prefix cache helps.
"""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.measuring import machine
from benchmarks.measuring.floor import read_seconds, weight_bytes
from benchmarks.peers.aerie import AerieTarget
from benchmarks.peers.openai_url import UrlTarget
from configs.host import host_config
from configs.resolve import HostConfig
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.source import resolve_source
from server.assembly.compose import build_engine
from server.assembly.offline import OfflineEngine
from server.assembly.operations import torch_dtype
from server.measuring.timing import Measured, Spread, Target, measure

METRICS = ("ttft", "ttit_p50", "ttit_p99", "tokens_per_second")
BASE = "transformers"  # ratios are relative to this target, if it runs
FIRST_TOKEN_ID = 1000  # special tokens are below it


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    batch_sizes: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    repeats: int
    vocab_size: int
    salt: int  # of the random prompts, so that no run hits the prefix cache of an earlier one


@dataclass(frozen=True, slots=True)
class Row:
    """One target at one batch size, over all repeats."""

    target: str
    batch: int
    metrics: dict[str, Spread]
    step_ratio: Spread | None  # ttit_p50 relative to BASE, per repeat


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="As for `aerie serve`.")] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URL", help="Also measure a server, e.g. vllm=http://host:8001/v1"
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    output_tokens: Annotated[int, typer.Option(min=2)] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    in_process: Annotated[bool, typer.Option(help="Measure Aerie inside this process.")] = True,
    transformers: Annotated[bool, typer.Option(help="Measure transformers.")] = True,
    output: Annotated[Path, typer.Option(help="JSON of the results.")] = Path(
        "benchmarks/out/latency.json"
    ),
) -> None:
    """Measure decode latency: time to first token, time per output token, tokens per second."""
    console = Console()
    settings = host_config(config, overrides or ())
    console.print("loading ...")
    targets, vocab_size = build_targets(settings, url or (), in_process, transformers)
    sizes = tuple(batch or (1, 8, 32))
    salt = secrets.randbits(32)
    plan = Plan(sizes, prompt_tokens, output_tokens, repeats, vocab_size, salt)
    runs = run_all(targets, plan, console)
    rows = [row for size in sizes for row in summarise(runs, targets, size)]
    floor = floor_ms(settings)
    show(console, rows, floor, plan)
    write_json(output, settings, plan, rows, floor)
    console.print(f"wrote {output}")


def build_targets(
    config: HostConfig, urls: Sequence[str], in_process: bool, transformers: bool
) -> tuple[list[Target], int]:
    """Load all targets; also returns the vocabulary size."""
    checkpoint = open_checkpoint(resolve_source(config.model.source, config.model.revision))
    targets: list[Target] = []
    if in_process:
        targets.append(AerieTarget(OfflineEngine(build_engine(config))))
    for entry in urls:
        name, _, address = entry.partition("=")
        targets.append(UrlTarget.discover(name, address))
    if transformers:
        from benchmarks.peers.transformers_generate import TransformersTarget

        dtype = torch_dtype(config.model.dtype)
        targets.append(TransformersTarget(checkpoint, dtype, config.kernels.threads))
    return targets, checkpoint.arch.vocab_size


Runs = dict[tuple[str, int], list[Measured]]


def run_all(targets: Sequence[Target], plan: Plan, console: Console) -> Runs:
    """All repeats of all batch sizes, after one warm-up each; targets take turns."""
    runs: Runs = {(t.name, size): [] for t in targets for size in plan.batch_sizes}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(runs) * (plan.repeats + 1))
        for size in plan.batch_sizes:
            for repeat in range(plan.repeats + 1):
                prompts = random_prompts(plan, size, repeat)
                for target in targets:
                    progress.update(task, description=f"{target.name}, batch {size}")
                    times = target.run(prompts, plan.output_tokens if repeat else 2)
                    if repeat:
                        runs[target.name, size].append(measure(times))
                    progress.advance(task)
    return runs


def random_prompts(plan: Plan, size: int, repeat: int) -> list[list[int]]:
    generator = random.Random(f"{plan.salt} {size} {repeat}")
    ids = range(min(FIRST_TOKEN_ID, plan.vocab_size - 1), plan.vocab_size)
    return [generator.choices(ids, k=plan.prompt_tokens) for _ in range(size)]


def summarise(runs: Runs, targets: Sequence[Target], size: int) -> list[Row]:
    """One row per target."""
    rows = []
    for target in targets:
        measured, base = runs[target.name, size], runs.get((BASE, size))
        ratios = None
        if base is not None:
            pairs = zip(measured, base, strict=True)
            ratios = Spread.of([mine.ttit_p50 / theirs.ttit_p50 for mine, theirs in pairs])
        metrics = {name: Spread.of([getattr(m, name) for m in measured]) for name in METRICS}
        rows.append(Row(target.name, size, metrics, ratios))
    return rows


def floor_ms(config: HostConfig) -> float:
    """Milliseconds to read all weights once."""
    checkpoint = open_checkpoint(resolve_source(config.model.source, config.model.revision))
    size = weight_bytes(checkpoint, torch_dtype(config.model.dtype).itemsize)
    return read_seconds(size, config.kernels.threads) * 1000


def show(console: Console, rows: Sequence[Row], floor: float, plan: Plan) -> None:
    """Print the table: medians, and the range over repeats of the time per token. It fits 80
    columns."""
    table = Table(
        title=f"{plan.prompt_tokens} prompt + {plan.output_tokens} output tokens, "
        f"median of {plan.repeats} (low-high), ms",
        caption="TTFT: time to the first token; TTIT: time per token after it, which others call "
        f"TPOT or ITL; x {BASE[:5]}: TTIT p50 relative to {BASE}, "
        f"x floor: to {floor:.1f} ms, in which all weights are read once",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    headings = ("batch", "target", "TTFT", "TTIT p50", "p99", "tokens/s")
    for heading in (*headings, f"x {BASE[:5]}", "x floor"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [_cell(row.metrics[name], name == "ttit_p50") for name in METRICS]
        ratio = "-" if row.step_ratio is None else f"{row.step_ratio.median:.2f}"
        distance = _short(row.metrics["ttit_p50"].median / floor)
        table.add_row(str(row.batch), row.target, *cells, ratio, distance)
    console.print(table)


def _cell(spread: Spread, ranged: bool) -> str:
    median = _short(spread.median)
    return f"{median} ({_short(spread.low)}-{_short(spread.high)})" if ranged else median


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def write_json(
    path: Path, config: HostConfig, plan: Plan, rows: Sequence[Row], floor: float
) -> None:
    """Write all results, with the machine and the settings."""
    content = {
        "benchmark": "latency",
        **machine.facts(),
        "model": {"source": config.model.source, "dtype": config.model.dtype},
        "threads": config.kernels.threads,
        "plan": asdict(plan),
        "floor_ms": floor,
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
