"""Which loss, depth and draft vocabulary make the better head: `python -m benchmarks.ablation`.

Trains one head per arm, all with the same data and budget, as `aerie train-draft` does: the file
of settings and the overrides are the same for all arms, and an arm changes one thing. A head is
judged by the mean of two acceptance lengths on held-out examples: of greedy drafts, and of drafts
at temperature 1 with shared noise.

    python -m benchmarks.ablation 'data.conversations=[answers.jsonl]' run.steps=200
    python -m benchmarks.ablation --config smollm2-eagle3-gpu 'data.prompts=[prompts.jsonl]' \\
        run.minutes=1
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measuring import machine
from benchmarks.tables import write_results
from configs.host import host_training_config
from drafter.train.history import Entry, History
from drafter.train.run import HISTORY
from server.assembly.heads.training import train_draft

ARMS: Mapping[str, tuple[str, ...]] = {
    "cross-entropy": ("loss.kind=cross_entropy",),
    "acceptance": ("loss.kind=acceptance",),
    "LK": ("loss.kind=lk",),
    "top-k": ("loss.kind=top_k",),
    "two layers": ("head.num_layers=2",),
    "draft vocabulary of 2048": ("head.draft_vocab_size=2048",),
    "draft vocabulary of 4096": ("head.draft_vocab_size=4096",),
    "draft vocabulary of 16384": ("head.draft_vocab_size=16384",),
}


@dataclass(frozen=True, slots=True)
class Arm:
    """What came of one head."""

    name: str
    changes: tuple[str, ...]
    num_steps: int
    num_answer_tokens: int  # learnt from
    cpu_seconds: float  # of the whole run, loading and measuring included
    greedy: float  # tokens per step of a chain, held out
    sampled: float  # the same at temperature 1

    @property
    def score(self) -> float:
        return (self.greedy + self.sampled) / 2


def main(
    overrides: Annotated[list[str], typer.Argument(metavar="SECTION.KEY=VALUE...")],
    config: Annotated[str, typer.Option(help="As of `aerie train-draft`.")] = "smollm2-eagle3",
    arm: Annotated[list[str] | None, typer.Option(help="Only these; default: all.")] = None,
    folder: Annotated[Path, typer.Option(help="For runs and heads; one folder per arm.")] = Path(
        "draft-heads/ablation"
    ),
    output: Annotated[Path, typer.Option(help="JSON; the table is written beside it.")] = Path(
        "benchmarks/out/ablation.json"
    ),
) -> None:
    """Train one head per arm, and compare them."""
    if unknown := set(arm or ()) - ARMS.keys():
        raise typer.BadParameter(f"{sorted(unknown)}; there are {', '.join(ARMS)}")
    found: list[Arm] = []
    for name in arm or ARMS:
        found.append(trained(name, config, overrides, folder / name.replace(" ", "-")))
        write_results("ablation", output, content(config, overrides, found))


def trained(name: str, config: str, overrides: Sequence[str], run: Path) -> Arm:
    """Train the head of an arm in the folder `run`. ValueError if that holds a run already."""
    if (run / HISTORY).exists():
        raise ValueError(f"{run} holds a run; --folder must name another folder")
    settings = host_training_config(Path(config), [*overrides, *ARMS[name], f"run.output={run}"])
    started = time.process_time()
    train_draft(settings)
    seconds = time.process_time() - started
    return result(name, History(run / HISTORY).entries, seconds)


def result(name: str, entries: Sequence[Entry], seconds: float) -> Arm:
    """Of a run's log."""
    last = [entry for entry in entries if entry.kind == "held out"][-1]
    assert last.sampled_acceptance_length is not None
    return Arm(
        name=name,
        changes=ARMS[name],
        num_steps=last.step,
        num_answer_tokens=last.num_answer_tokens,
        cpu_seconds=round(seconds, 1),
        greedy=last.acceptance_length,
        sampled=last.sampled_acceptance_length,
    )


def content(config: str, overrides: Sequence[str], found: Sequence[Arm]) -> dict[str, Any]:
    """What is stored: the best arm first."""
    ranked = sorted(found, key=lambda arm: -arm.score)
    return {
        "benchmark": "ablation",
        **machine.facts(),
        "config": config,
        "overrides": [each for each in overrides if not each.startswith(("data.", "run.output"))],
        "arms": [asdict(arm) | {"score": round(arm.score, 4)} for arm in ranked],
    }


if __name__ == "__main__":
    typer.run(main)
