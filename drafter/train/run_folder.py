"""The folder of a training run. Its newest checkpoint is published as a head with a model card;
that needs neither the target nor the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from configs.load import as_yaml, load_schema
from configs.training import TRAIN, TrainingConfig
from drafter.train.checkpoints import CheckpointFolder, Progress, load_progress, load_weights
from drafter.train.history import write_whole
from drafter.train.results.model_card import DataSource, ModelCard
from drafter.train.results.publish import publish
from drafter.train.results.report import Report
from drafter.train.run import CHECKPOINTS, FREE_KEYS
from drafter.train.run_record import RunRecord

SETTINGS, RECORD = "config.yaml", "run.json"
HOST_SECTIONS = {"kernels", "files"}  # settings of a machine, not of a run


def record_run(config: TrainingConfig, record: RunRecord) -> None:
    """Write the files in run.output that `publish_run` and `check_same_settings` read."""
    output = config.run.output
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / SETTINGS, as_yaml(config, HOST_SECTIONS).encode())
    record.write(output / RECORD)


def check_same_settings(config: TrainingConfig) -> None:
    """ValueError, naming the keys, if run.output holds checkpoints with other settings."""
    output = config.run.output
    if _newest(output) is None or not (output / SETTINGS).is_file():
        return
    earlier = load_schema(TrainingConfig, TRAIN, output / SETTINGS, ())
    changes = list(_differences(_decisive(earlier), _decisive(config)))
    if changes:
        raise ValueError(
            f"{output} holds a run with other settings: {'; '.join(changes)}. Set run.output to "
            "another folder, or train its weights further with head.init"
        )


def check_no_run(output: Path) -> None:
    """ValueError if `output` holds checkpoints: a run by the clock begins anew."""
    found = _newest(output)
    if found is not None:
        raise ValueError(
            f"{output} holds a run ({found.name}), and one with run.minutes cannot be resumed; set "
            "run.output to another folder, or train that head further with head.init"
        )


def publish_run(
    run: Path,
    output: Path,
    *,
    overrides: Iterable[str] = (),
    report: Path | None = None,
    replace: bool = False,
    max_file_bytes: int | None = None,
) -> None:
    """Write the newest checkpoint of the folder `run` (run.output of a training run) as a head.

    Args:
        overrides: `card.key=value`, settings of the model card.
        report: numbers for the card, a file that `aerie eval-draft` wrote.
        max_file_bytes: limit of each file of weights; None: one file.

    Raises:
        FileExistsError: `output` exists, and `replace` is not set or `output` is not a head.
        OSError, ValueError: `run` holds no checkpoint or a damaged one, or the disk is full.
    """
    overrides = list(overrides)
    for text in overrides:
        if not text.startswith("card."):
            raise ValueError(f"{text!r}: only card.* can be set for a trained head")
    checkpoint = _newest(run)
    if checkpoint is None or not (run / SETTINGS).is_file():
        raise ValueError(f"{run} holds no checkpoint of a training run (aerie train-draft)")
    config = load_schema(TrainingConfig, TRAIN, run / SETTINGS, overrides)
    record, progress = RunRecord.read(run / RECORD), load_progress(checkpoint)
    if progress.fingerprint != record.fingerprint:
        raise ValueError(f"{run / RECORD} is not of the run that made {checkpoint}")
    weights = load_weights(checkpoint)
    size = sum(tensor.numel() for tensor in weights.values())
    found = None if report is None else Report.read(report)
    publish(
        output,
        record.head,
        record.target,
        weights,
        None if record.target_ids is None else torch.tensor(record.target_ids),
        _card(config, _training_facts(config, record, progress, size), found),
        replace=replace,
        max_shard_bytes=max_file_bytes,
    )


def _newest(run: Path) -> Path | None:
    return CheckpointFolder(run / CHECKPOINTS, keep=1).latest()


def _decisive(config: TrainingConfig) -> dict[str, Any]:
    """The settings of each section that affect what is learnt."""
    return config.model_dump(mode="json", exclude=FREE_KEYS)


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for section, keys in now.items():
        for key, value in keys.items():
            if earlier[section][key] != value:
                yield f"{section}.{key} was {earlier[section][key]!r}, is now {value!r}"


def _training_facts(
    config: TrainingConfig, record: RunRecord, progress: Progress, num_parameters: int
) -> dict[str, str | int | float]:
    facts: dict[str, str | int | float] = {
        "optimizer steps": progress.step,
        "answer tokens learnt from": progress.num_answer_tokens,
        "hours x processes": round(progress.seconds / 3600 * record.num_processes, 2),
        "head parameters": num_parameters,
        "files of conversations": _names(config.data.conversations),
        "files of prompts, answered by the target": _names(config.data.prompts),
        "began from": Path(config.head.init).name,
    }
    if record.target_ids is not None:
        facts["draft vocabulary"] = len(record.target_ids)
        facts["answer tokens in the draft vocabulary"] = f"{record.coverage:.1%}"
    for section in ("head", "loss", "optimizer"):
        for key, value in getattr(config, section).model_dump(mode="json").items():
            if value is not None and key != "init":
                facts[f"{section}.{key}"] = str(value)
    return facts


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths) or "none"


def _card(
    config: TrainingConfig, training: Mapping[str, str | int | float], report: Report | None
) -> ModelCard:
    said = config.card
    return ModelCard(
        name=said.name,
        summary=said.summary,
        target=said.target or config.model.source,
        licence=said.licence,
        sources=tuple(DataSource(**source.model_dump()) for source in said.sources),
        training=training,
        report=report,
    )
