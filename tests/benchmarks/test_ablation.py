"""Arms of an ablation are trained with the same budget, and judged greedily and sampled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.ablation import ARMS, Arm, content, main, trained
from tests.support.heads.training_commands import STEPS, arguments, write_model_and_data
from tests.support.machine.threads import own_torch_threads


def test_arms_are_trained_alike_and_ranked_by_both_temperatures(
    tmp_path: Path, native_cache: Path
) -> None:
    folder = write_model_and_data(tmp_path)
    empty = tmp_path / "empty.yaml"
    empty.touch()
    given = [
        each
        for each in arguments(folder, native_cache, tmp_path, run__evaluate_every=STEPS)
        if not each.startswith("run.output")
    ]
    output = tmp_path / "found.json"
    with own_torch_threads():
        main(given, str(empty), ["top-k", "two layers"], tmp_path / "runs", output)
    found = json.loads(output.read_text())
    assert {arm["name"] for arm in found["arms"]} == {"top-k", "two layers"}
    assert len({arm["num_answer_tokens"] for arm in found["arms"]}) == 1
    for arm in found["arms"]:
        assert arm["num_steps"] == STEPS
        assert arm["greedy"] >= 1
        assert arm["sampled"] >= 1
    assert "| two layers | " in output.with_suffix(".md").read_text()
    assert not any(each.startswith("data.") for each in found["overrides"])
    with pytest.raises(ValueError, match="top-k holds a run; --folder must name another"):
        trained("top-k", str(empty), given, tmp_path / "runs" / "top-k")


def test_the_best_arm_comes_first() -> None:
    arms = [
        Arm(name, (), 1, 2000, 60.0, *pair)
        for name, pair in zip("ab", [(1.5, 1.1), (1.4, 1.3)], strict=True)
    ]
    found = content("x", ["data.prompts=[a]", "run.steps=1"], arms)
    assert [(arm["name"], arm["score"]) for arm in found["arms"]] == [("b", 1.35), ("a", 1.3)]
    assert found["overrides"] == ["run.steps=1"]
    assert all(len(changes) == 1 for changes in ARMS.values())
