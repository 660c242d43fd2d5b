"""A dry run tells sizes, memory and time, and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.training import HostTrainingConfig
from server.assembly.heads.training_estimate import dry_run
from tests.support.heads.training_commands import aerie, arguments, write_model_and_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_data(tmp_path_factory.mktemp("model"))


def test_it_tells_what_a_run_would_need(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.touch()
    output = tmp_path / "run"
    words = arguments(folder, tmp_path, output)
    done = aerie("train-draft", "--config", empty, *words, "--dry-run")
    assert done.exit_code == 0, done.output
    target, head, data, memory, steps = done.stdout.splitlines()
    assert target.endswith("parameters, 0.00 GB in float32")
    assert head.startswith("head: eagle3, 41,280 parameters, ")
    assert data == "0 prompts and 11 conversations; measured on 3 of them"
    assert memory.startswith("memory, at least 0.0 GB: target 0.00, head in training 0.00, batch")
    assert steps == "6 steps of up to 150 tokens in each process"
    assert not output.exists()
    wrong = aerie("train-draft", "--config", empty, *words, "head.init=/nowhere", "--dry-run")
    assert wrong.exit_code == 2
    assert "/nowhere" in wrong.stderr


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {},
            "9 minutes of one H200: some 49 million answer tokens drawn, 55 to 132 million learnt",
        ),
        ({"loss": {"unroll_steps": 1}}, "some 49 million answer tokens drawn, 84 to"),
        ({"data": {"answering": 0.25}}, "some 34 million answer tokens drawn, 64 to"),
    ],
)
def test_the_time_is_that_of_the_run_that_was_measured(
    changes: dict[str, dict[str, object]], told: str, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["a"]}\n' * 9)
    sections: dict[str, dict[str, object]] = {
        "model": {"source": "smollm2-135m-instruct"},
        "data": {"prompts": [str(prompts)], "held_out": 2, "rows": 2048, "max_tokens": 704},
        "head": {"draft_vocab_size": 8192},
        "loss": {"unroll_steps": 4},
        "run": {"minutes": 9, "batch_tokens": 65536},
        "kernels": {"threads": 1},
        "files": {"dir": str(tmp_path)},
    }
    for name, more in changes.items():
        sections[name] = {**sections[name], **more}
    lines = list(dry_run(HostTrainingConfig.model_validate(sections)))
    assert lines[0].startswith("target smollm2-135m-instruct: 134,515,008 parameters, 0.27 GB")
    assert lines[1] == "head: eagle3, 9,808,128 parameters, a file of 19.6 MB"
    assert "pages of 2048 answers 33.22" in lines[3]
    assert told in lines[4]
