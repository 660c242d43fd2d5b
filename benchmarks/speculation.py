"""Acceptance and speed of a draft head, by tree and temperature.

Acceptance length is the mean number of tokens that a verified tree emits, the bonus token counted.
At temperature above 0 both rankings are shown: with the noise that the target will draw with, and
without it. The text is the same in every line; only the time differs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine
from configs.host import host_config
from configs.schema import Config
from engine.models.source import resolve_source
from engine.request import Request, SamplingParams
from engine.spec.planner import FixedPlanner
from server.compose import build_engine, tree_shape
from server.offline import OfflineEngine
from server.text.chat_template import ChatTemplate
from server.text.tokenizer_files import load_tokenizer

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a short poem about autumn.",
    "Explain how a bicycle stays upright.",
    "Give me a recipe for pancakes.",
    "Summarise the plot of Romeo and Juliet.",
    "Write a Python function that checks whether a number is prime.",
    "What are three ways to save energy at home?",
    "Tell me about the moons of Jupiter.",
)


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table."""

    tree: str
    temperature: float
    shared_noise: bool
    acceptance_length: float
    reached: tuple[float, ...]  # [d]: share of trees whose path has depth d + 1 or more
    tokens_per_second: float
    speedup: float  # against the root alone, same temperature, same run


def main(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...")] = None,
    config: Annotated[Path | None, typer.Option(help="As of `aerie serve`.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSONL with {"messages": [...]} or {"turns": [...]}.')
    ] = None,
    limit: Annotated[int, typer.Option(help="Prompts to use.")] = 16,
    tree: Annotated[list[str] | None, typer.Option(help="Trees; default: a choice.")] = None,
    temperature: Annotated[list[float] | None, typer.Option()] = None,
    batch: Annotated[int, typer.Option(help="Requests at once.")] = 1,
    output_tokens: Annotated[int, typer.Option()] = 128,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/out/speculation.json"),
) -> None:
    """Show acceptance length and speed of the configured draft head (speculation.draft)."""
    settings = host_config(config, overrides or ())
    trees = tree or ["chain1", "chain3", "chain5", "tree8", "tree16", "dynamic16"]
    texts = list(questions(prompts, limit))
    lines: list[Line] = []
    for heat in temperature or (0.0, 1.0):
        for shared_noise in (True, False) if heat else (True,):
            engine = _engine(settings, shared_noise)
            requests = _requests(settings, texts, heat, output_tokens)
            lines += measure(engine, requests, trees, heat, shared_noise, batch)
    show(lines)
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": "speculation", **machine.facts(), "lines": [asdict(x) for x in lines]}
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def questions(path: Path | None, limit: int) -> Iterator[str]:
    """First user turns."""
    if path is None:
        yield from QUESTIONS[:limit]
        return
    for line in path.read_text(encoding="utf-8").splitlines()[:limit]:
        entry = json.loads(line)
        yield entry["turns"][0] if "turns" in entry else entry["messages"][0]["content"]


def measure(
    engine: OfflineEngine,
    requests: Sequence[Request],
    trees: Sequence[str],
    temperature: float,
    shared_noise: bool,
    batch: int,
) -> list[Line]:
    """One line per tree, the root alone first."""
    lines: list[Line] = []
    plain = 0.0
    engine.core.plan_with(FixedPlanner())
    _run(engine, requests, batch, "warm-up")  # and every prompt is in the prefix cache for all
    for name in track(("root", *trees), description=f"temperature {temperature}"):
        engine.core.plan_with(FixedPlanner(tree_shape(name)))
        before = engine.core.stats()
        seconds, num_tokens = _run(engine, requests, batch, name)
        after = engine.core.stats()
        rate = num_tokens / seconds
        plain = plain or rate
        drafts = after.num_drafts - before.num_drafts
        accepted = after.num_accepted_tokens - before.num_accepted_tokens
        missing = len(after.accepted_per_position) - len(before.accepted_per_position)
        earlier = (*before.accepted_per_position, *[0] * missing)
        reached = tuple(
            round((now - then) / drafts, 3) if drafts else 0.0
            for now, then in zip(after.accepted_per_position, earlier, strict=True)
        )
        length = 1 + (accepted / drafts if drafts else 0.0)
        lines.append(Line(name, temperature, shared_noise, length, reached, rate, rate / plain))
    return lines


def _run(
    engine: OfflineEngine, requests: Sequence[Request], batch: int, tag: str
) -> tuple[float, int]:
    """Seconds and tokens of all requests, `batch` at a time."""
    seconds, num_tokens = 0.0, 0
    for first in range(0, len(requests), batch):
        some = [
            Request(request_id=f"{tag}-{first + i}", prompt_ids=r.prompt_ids, params=r.params)
            for i, r in enumerate(requests[first : first + batch])
        ]
        started = time.perf_counter()
        done = engine.generate(some)
        seconds += time.perf_counter() - started
        num_tokens += sum(len(c.token_ids) for c in done.values())
    return seconds, num_tokens


def _engine(config: Config, shared_noise: bool) -> OfflineEngine:
    speculation = config.speculation.model_copy(
        update={"shared_noise": shared_noise, "tree": "root"}
    )
    return OfflineEngine(build_engine(config.model_copy(update={"speculation": speculation})))


def _requests(
    config: Config, texts: Sequence[str], temperature: float, output_tokens: int
) -> list[Request]:
    files = resolve_source(config.model.source, config.model.revision)
    assert config.files.dir is not None
    tokenizer = load_tokenizer(files, config.files.dir, None)
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    return [
        Request(
            request_id=str(seed),
            prompt_ids=tokenizer.encode(
                template.render([{"role": "user", "content": text}]), add_special_tokens=False
            ),
            params=SamplingParams(max_tokens=output_tokens, temperature=temperature, seed=seed),
        )
        for seed, text in enumerate(texts)
    ]


def show(lines: Sequence[Line]) -> None:
    table = Table(title="acceptance length = tokens per verified tree, bonus counted")
    for heading in ("T", "tree", "noise shared", "acceptance", "tokens/s", "x root"):
        table.add_column(heading, justify="right")
    table.add_column("share of trees that reach depth 1, 2, ...")
    for line in lines:
        table.add_row(
            f"{line.temperature:g}",
            line.tree,
            "yes" if line.shared_noise else "no",
            f"{line.acceptance_length:.2f}",
            f"{line.tokens_per_second:.1f}",
            f"{line.speedup:.2f}",
            " ".join(f"{share:.2f}" for share in line.reached),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
