"""`aerie eval-draft`: a draft head of a tiny model, evaluated from the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from drafter.checkpoint import save_eagle3
from drafter.heads.untrained import eagle3_config, random_eagle3
from drafter.train.data.conversations import read_prompts
from drafter.train.results.report import Report
from engine.checkpoints.arch import LlamaArch
from server.assembly.heads.evaluation import _verdict, sample_prompts
from server.cli import app
from server.commands.drafts import TREES
from tests.support.machine.threads import own_torch_threads
from tests.support.models.tiny_llama import write_tiny_llama
from tests.support.servers.live_server import run_aerie

PROMPTS = ({"turns": ["the quick brown fox", "and then?"]}, {"turns": ["a server"]})


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    with own_torch_threads():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an untrained head for it and prompts."""
    folder = tmp_path_factory.mktemp("model")
    model = write_tiny_llama(folder / "model")
    target = LlamaArch.from_hf_config(model.config.to_dict())
    config = dataclasses.replace(eagle3_config(target), aux_layers=(0, 1))
    tensors = random_eagle3(config, target, seed=1, std=0.3)
    save_eagle3(folder / "head", config, target, tensors, None)
    lines = [json.dumps(prompt) for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def eval_draft(folder: Path, cache: Path, *arguments: object) -> Result:
    settings = [
        f"model.source={folder / 'model'}",
        "model.dtype=float32",
        "cache.num_blocks=64",
        "scheduler.max_num_seqs=4",
        f"files.dir={cache}",
    ]
    options = ["--prompts", folder / "prompts.jsonl", "--output-tokens", 9]
    words = ["eval-draft", *settings, *options, *arguments]
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_both_temperatures_and_rankings_are_measured_and_written(
    folder: Path, native_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "report.json"
    options: list[Any] = ["--tree", "chain2", "--tree", "dynamic8", "--compare-ranking"]
    options += ["--batch", 2, "--output", output, f"speculation.draft={folder / 'head'}"]
    done = eval_draft(folder, native_cache, *options)
    assert done.exit_code == 0, done.output
    report = Report.read(output)
    told = (report.prompts, report.num_prompts, report.num_turns, report.output_tokens)
    assert told == ("prompts.jsonl", 2, 2, 9)
    trees = ("root", "chain2", "dynamic8")
    lines = [(one.temperature, one.shared_noise, one.tree) for one in report.measurements]
    rankings = ((0.0, True), (1.0, True), (1.0, False))
    assert lines == [(*ranking, tree) for ranking in rankings for tree in trees]
    assert {one.num_changed for one in report.measurements} == {0}
    assert all((one.num_drafts > 0) == (one.tree != "root") for one in report.measurements)
    assert all(tree in done.stdout for tree in trees)


def test_limits_and_one_temperature_are_respected(
    folder: Path, native_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    options: list[Any] = ["--limit", 1, "--turns", 1, "--temperature", 0.5, "--tree", "chain1"]
    options += ["--output", output, f"speculation.draft={folder / 'head'}"]
    assert eval_draft(folder, native_cache, *options).exit_code == 0
    report = Report.read(output)
    assert (report.num_prompts, report.num_turns) == (1, 1)
    assert [(one.temperature, one.shared_noise) for one in report.measurements] == [(0.5, True)] * 2


def test_both_meanings_of_layer_ids_are_compared(
    folder: Path, native_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    options: list[Any] = ["--limit", 1, "--temperature", 0, "--tree", "chain2", "--compare-aux"]
    options += ["--output", output, f"speculation.draft={folder / 'head'}"]
    done = eval_draft(folder, native_cache, *options)
    assert done.exit_code == 0, done.output
    report = Report.read(output)
    assert set(report.by_aux_layers) == {"outputs", "boundaries"}
    # The head's file names boundaries.
    assert report.by_aux_layers["boundaries"] == report.measurements[-1].acceptance_length
    assert "speculation.aux_layers=" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"outputs": 2.5, "boundaries": 1.4}, "speculation.aux_layers=outputs is accepted more: 2"),
        ({"outputs": 1.0, "boundaries": 1.4}, "speculation.aux_layers=boundaries is accepted more"),
        ({"outputs": 1.41, "boundaries": 1.4}, "Too close to tell: speculation.aux_layers=outputs"),
    ],
)
def test_the_verdict_names_the_setting(found: dict[str, float], said: str) -> None:
    assert said in _verdict(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no draft head to measure"),
        (["speculation.draft=/nowhere", "--tree", "oak"], "no tree 'oak'; shipped ones: chain1"),
        (["speculation.draft=/nowhere", "--batch", 5], "batch is 5; it must be 1 to scheduler.max"),
        (["speculation.draft=/nowhere", "--temperature", "nan"], "temperature is nan; it must be"),
        (["speculation.draft=/nowhere", "--temperature", 2.1], "temperature is 2.1; it must be 0"),
        (["speculation.draft=/nowhere", "--prompts", "/nowhere"], "No such file or directory"),
        (["speculation.draft=/nowhere"], "no draft head at '/nowhere'"),
        (["speculation.tre=root"], "unknown key 'speculation.tre'"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    arguments: list[object], message: str, folder: Path, native_cache: Path
) -> None:
    done = eval_draft(folder, native_cache, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("aerie: ")
    assert message in line


def test_help_names_options_and_the_default_trees() -> None:
    done = run_aerie("eval-draft", "--help", extra={"COLUMNS": "100", "NO_COLOR": "1"})
    assert done.returncode == 0
    wanted = ["--prompts", "--limit", "--turns", "--tree", "--temperature", "--output-tokens"]
    wanted += ["--batch", "--output", "--compare-ranking", "--config", *TREES]
    assert [text for text in wanted if text not in done.stdout] == []


def test_the_shipped_sample_can_be_evaluated() -> None:
    prompts = list(read_prompts(sample_prompts()))
    assert len(prompts) > 3
    assert any(prompt.later_turns for prompt in prompts)
