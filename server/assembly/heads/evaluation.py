"""`aerie eval-draft`: measures draft heads with the engine and the tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from configs.resolve import HostConfig
from drafter.checkpoint import read_head_config
from drafter.source import ACCEPTED, resolve_draft
from drafter.train.data.conversations import Prompt, read_prompts, sample_file
from drafter.train.results.evaluate import Question, Sampling, ask_plainly, measure_trees
from drafter.train.results.report import Measurement, Report
from engine.checkpoints.checkpoint import read_arch
from engine.step.shape import ROOT, TreeShape
from server.assembly.compose import build_engine
from server.assembly.drafting import tree_shape
from server.assembly.offline import OfflineEngine
from server.text.chat_codec import load_codec

MAX_TEMPERATURE = 2  # as in the HTTP API
MEANINGS: tuple[Literal["outputs", "boundaries"], ...] = ("outputs", "boundaries")
SURE = 0.02  # relative difference of acceptance lengths from which one is better


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Which prompts to answer, and which trees to measure."""

    prompts: Path | None  # None: the sample that comes with the package
    limit: int | None  # prompts
    num_turns: int
    trees: tuple[str, ...]
    temperatures: tuple[float, ...]
    output_tokens: int
    batch: int
    compare_ranking: bool  # also measure without shared noise
    with_lookup: bool  # measure every tree again with prompt lookup
    compare_aux: bool = False  # also measure both meanings of the head's ids of target layers

    def __post_init__(self) -> None:
        for temperature in self.temperatures:
            if not 0 <= temperature <= MAX_TEMPERATURE:
                raise ValueError(f"temperature is {temperature}; it must be 0 to {MAX_TEMPERATURE}")


def sample_prompts() -> Path:
    """The prompts that come with the package."""
    return sample_file("prompts.jsonl")


def evaluate_draft(config: HostConfig, evaluation: Evaluation) -> Report:
    """Measure the head that `config` names; tells its progress on stderr.

    Raises:
        OSError, ValueError: configuration, model, head, trees or prompts are invalid.
    """
    if evaluation.batch > config.scheduler.max_num_seqs:
        raise ValueError(
            f"batch is {evaluation.batch}; it must be 1 to scheduler.max_num_seqs = "
            f"{config.scheduler.max_num_seqs}"
        )
    shapes = [tree_shape(name) for name in evaluation.trees]
    path = evaluation.prompts or sample_prompts()
    prompts = list(islice(read_prompts(path), evaluation.limit))
    head = resolve_draft(config.speculation.draft, config.model.source)
    if head is None:
        raise ValueError(f"there is no draft head to measure: speculation.draft must be {ACCEPTED}")
    if evaluation.compare_aux:
        _check_ids(config, head)
    engine = _engine(config, shared_noise=True)
    device = engine.info.device
    questions = list(_questions(config, engine, prompts, evaluation))
    found = _told(_measurements(engine, questions, shapes, evaluation, shared_noise=True))
    if evaluation.compare_ranking and any(evaluation.temperatures):
        del engine  # frees its memory for the next engine
        engine = _engine(config, shared_noise=False)
        sampled = [part for part in questions if part[0].params.temperature]
        found += _told(_measurements(engine, sampled, shapes, evaluation, shared_noise=False))
    del engine
    by_aux = _by_aux(config, questions[0], shapes, evaluation) if evaluation.compare_aux else {}
    return Report(
        target=config.model.source,
        draft=head.name,
        dtype=config.model.dtype,
        device=device,
        prompts=path.name,
        num_prompts=len(prompts),
        num_turns=evaluation.num_turns,
        output_tokens=evaluation.output_tokens,
        batch=evaluation.batch,
        measurements=found,
        by_aux_layers=by_aux,
    )


def _check_ids(config: HostConfig, head: Path) -> None:
    """ValueError if the head names no layers that could be understood in two ways."""
    target = read_arch(config.model.source, config.model.revision)
    for meaning in MEANINGS:
        read_head_config(head, target, meaning)


def _by_aux(
    config: HostConfig,
    questions: Sequence[Question],
    shapes: Sequence[TreeShape],
    evaluation: Evaluation,
) -> dict[str, float]:
    """The acceptance length of the first tree for each meaning of the head's ids."""
    found: dict[str, float] = {}
    for meaning in MEANINGS:
        speculation = config.speculation.model_copy(update={"aux_layers": meaning})
        changed = config.model_copy(update={"speculation": speculation})
        engine = _engine(changed, shared_noise=True)
        *_, last = measure_trees(engine, questions, shapes[:1], evaluation.batch, True)
        del engine
        found[meaning] = last.acceptance_length
        _tell(f"aux_layers {meaning}, {last.tree}: {last.acceptance_length:.2f} tokens per tree")
    return found


def show(report: Report) -> None:
    """Print a report as a table."""
    table = Table(title=f"{report.draft}: acceptance on {report.num_prompts} prompts")
    for heading in ("T", "tree", "noise shared", "acceptance", "tokens/s", "x root", "changed"):
        table.add_column(heading, justify="right")
    for heading in ("trees that reach depth 1, 2, ...", "accepted at position 1, 2, ..."):
        table.add_column(heading)
    for line in report.measurements:
        table.add_row(
            f"{line.temperature:g}",
            _drafting(line),
            "yes" if line.shared_noise else "no",
            f"{line.acceptance_length:.2f}" if line.num_drafts else "-",
            f"{line.tokens_per_second:.1f}",
            f"{line.speedup:.2f}",
            str(line.num_changed),
            " ".join(f"{share:.2f}" for share in line.reached),
            " ".join(f"{share:.2f}" for share in line.conditional),
        )
    Console(width=150).print(table)
    if report.by_aux_layers:
        print(_verdict(report.by_aux_layers))


def _verdict(by_aux: Mapping[str, float]) -> str:
    """Which meaning of the head's ids of target layers is accepted more."""
    more, less = sorted(by_aux, key=lambda meaning: -by_aux[meaning])
    numbers = f"{by_aux[more]:.2f} tokens per tree, against {by_aux[less]:.2f} with {less}"
    if by_aux[more] - by_aux[less] < SURE * by_aux[less]:
        return f"Too close to tell: speculation.aux_layers={more} gives {numbers}."
    return f"speculation.aux_layers={more} is accepted more: {numbers}."


def _engine(config: HostConfig, shared_noise: bool) -> OfflineEngine:
    """Plain at first: what `auto` would measure at start is not needed."""
    changes: dict[str, bool | str] = {"shared_noise": shared_noise, "tree": ROOT.name}
    speculation = config.speculation.model_copy(update=changes)
    return OfflineEngine(build_engine(config.model_copy(update={"speculation": speculation})))


def _questions(
    config: HostConfig, engine: OfflineEngine, prompts: Sequence[Prompt], evaluation: Evaluation
) -> Iterator[list[Question]]:
    """Questions with their plain answers, for each temperature."""
    codec = load_codec(config)
    for temperature in evaluation.temperatures:
        _tell(f"temperature {temperature:g}: {len(prompts)} prompts are answered plainly")
        sampling = Sampling(temperature, evaluation.output_tokens, evaluation.num_turns)
        yield ask_plainly(engine, codec, prompts, sampling, evaluation.batch)


def _measurements(
    engine: OfflineEngine,
    questions: Sequence[Sequence[Question]],
    shapes: Sequence[TreeShape],
    evaluation: Evaluation,
    *,
    shared_noise: bool,
) -> Iterator[Measurement]:
    for same_temperature in questions:
        yield from measure_trees(
            engine,
            same_temperature,
            shapes,
            evaluation.batch,
            shared_noise,
            with_lookup=evaluation.with_lookup,
        )


def _told(measurements: Iterator[Measurement]) -> list[Measurement]:
    """All measurements; prints each as it comes, since they take minutes."""
    found = []
    for one in measurements:
        found.append(one)
        _tell(
            f"temperature {one.temperature:g}, {_drafting(one)}: {one.acceptance_length:.2f} "
            f"tokens per tree, {one.tokens_per_second:.1f} tokens/s"
        )
    return found


def _drafting(one: Measurement) -> str:
    return f"{one.tree} + lookup" if one.lookup else one.tree


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
