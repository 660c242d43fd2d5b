"""A run learns, depends only on its seed, and resumes as if it had never stopped."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.training import TrainingConfig
from drafter.train import trainer as training
from drafter.train.data.encoding import Example
from drafter.train.head.objective import Tally
from drafter.train.head.unroll import TrainBatch
from drafter.train.history import Entry
from drafter.train.run import LoadedTarget, prepare
from drafter.train.trainer import Trainer, Worker
from kernels.ops import Ops
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.heads.tiny_training import greedy_examples, tiny_config, tiny_target

TIMES = ("seconds", "tokens_per_second")


class StoppedError(Exception):
    """Ends a run in these tests."""


@pytest.fixture(scope="module")
def tiny(reference_ops: Ops) -> TinyEngine:
    small = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_attention_heads": 4}
    return TinyEngine(random_llama(**small), reference_ops)


@pytest.fixture(scope="module")
def target(tiny: TinyEngine) -> LoadedTarget:
    return tiny_target(tiny.oracle, tiny.ops)


@pytest.fixture(scope="module")
def examples(tiny: TinyEngine) -> list[Example]:
    return greedy_examples(tiny, 14)


@pytest.fixture
def make(target: LoadedTarget, examples: list[Example]) -> Callable[[TrainingConfig], Trainer]:
    return lambda config: prepare(config, target, examples, Worker()).trainer


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, and moments and counts of the optimizer."""
    found = trainer.objective.network.state_dict() | trainer.optimizer.state()
    return {name: tensor.clone() for name, tensor in found.items()}


def untimed(entries: list[Entry]) -> list[dict[str, Any]]:
    lines = [dataclasses.asdict(entry) for entry in entries]
    return [{name: x for name, x in line.items() if name not in TIMES} for line in lines]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def stop_after(step: int) -> Callable[[Entry], None]:
    def on_step(entry: Entry) -> None:
        if entry.step == step:
            raise StoppedError

    return on_step


class Failing:
    """An objective that fails in its n-th batch, after some gradients have been added."""

    def __init__(self, trainer: Trainer, calls: int) -> None:
        self._inner, self._left = trainer.objective, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, batch: TrainBatch) -> tuple[Tensor, Tally]:
        loss, tally = self._inner(batch)
        self._left -= torch.is_grad_enabled()
        if self._left == 0:
            torch.autograd.backward(loss)
            raise StoppedError
        return loss, tally


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", ["eagle3", "eagle", "dense"])
def test_resumed_equals_uninterrupted(
    kind: str, accumulation: int, make: Callable[[TrainingConfig], Trainer], tmp_path: Path
) -> None:
    """StoppedError after each step in turn, and inside some steps."""
    run = {"accumulation": accumulation}
    whole = make(tiny_config(tmp_path / "whole", kind, run=run))
    assert bool(whole.feature_noise) == (kind != "eagle3")
    assert whole.run()
    cut = make(tiny_config(tmp_path / "cut", kind, run=run))
    for step in (1, 2, 4, 6):  # there are checkpoints at 3 and 6
        assert cut.resume() == (step == 6)
        with pytest.raises(StoppedError):
            cut.run(stop_after(step))
        cut = make(tiny_config(tmp_path / "cut", kind, run=run))
        cut.resume()
        cut.objective = Failing(cut, 2)  # type: ignore[assignment]
        with pytest.raises(StoppedError):
            cut.run()
        cut = make(tiny_config(tmp_path / "cut", kind, run=run))
    assert cut.resume()
    assert cut.run()
    assert_same(state(cut), state(whole))
    assert untimed(cut.history.entries) == untimed(whole.history.entries)
    reread = make(tiny_config(tmp_path / "cut", kind, run=run)).history
    assert untimed(reread.entries) == untimed(whole.history.entries)
    assert [e.step for e in reread.entries if e.kind == "held out"] == [0, 2, 4, 6, 7]


def test_a_run_that_is_cut_saves_and_goes_on_later(
    make: Callable[[TrainingConfig], Trainer], tmp_path: Path
) -> None:
    whole = make(tiny_config(tmp_path / "whole"))
    assert whole.run()
    cut = make(tiny_config(tmp_path / "cut"))
    assert not cut.run(lambda entry: cut.cut() if entry.step == 3 else None)
    assert (cut.step, cut.checkpoints.latest()) == (3, tmp_path / "cut/checkpoints/step-000003")
    again = make(tiny_config(tmp_path / "cut"))
    again.resume()
    assert again.run()
    assert_same(state(again), state(whole))


def test_a_time_limit_saves_where_it_stops_and_the_run_goes_on_from_there(
    make: Callable[[TrainingConfig], Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tiny_config(tmp_path / "whole"))
    whole.run()
    clock = SimpleNamespace(monotonic=itertools.count().__next__)
    monkeypatch.setattr(training, "time", clock)
    steps = []
    for _ in range(9):
        cut = make(tiny_config(tmp_path / "cut", run={"max_seconds": 5}))
        cut.resume()
        done = cut.run()
        steps.append(cut.step)
        assert cut.checkpoints.latest() == tmp_path / f"cut/checkpoints/step-{cut.step:06d}"
        if done:
            break
    assert steps == [2, 4, 6, 7]
    assert_same(state(cut), state(whole))
    assert untimed(cut.history.entries) == untimed(whole.history.entries)


def test_a_finished_run_writes_nothing_again(
    make: Callable[[TrainingConfig], Trainer], tmp_path: Path
) -> None:
    make(tiny_config(tmp_path)).run()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = make(tiny_config(tmp_path))
    assert again.resume()
    assert again.run()
    history = tmp_path / "history.jsonl"  # is rewritten with equal content
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {**after, history: 0} == {**before, history: 0}


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(
    make: Callable[[TrainingConfig], Trainer], tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        make(tiny_config(tmp_path)).run(stop_after(2))
    again = make(tiny_config(tmp_path))
    assert again.history.entries
    assert not again.resume()
    again.run()
    assert [e.step for e in again.history.entries if e.kind == "train"] == list(range(1, 8))


def test_the_seed_alone_decides(make: Callable[[TrainingConfig], Trainer], tmp_path: Path) -> None:
    found = []
    for place, seed in enumerate((5, 5, 6)):
        one = make(tiny_config(tmp_path / str(place), run={"seed": seed, "steps": 3}))
        one.run()
        found.append(state(one))
    assert_same(found[0], found[1])
    assert not torch.equal(found[0]["fc.weight"], found[2]["fc.weight"])


@pytest.mark.parametrize(
    "changes",
    [{"head": {"intermediate_size": 72}}, {"run": {"seed": 1}}, {"data": {"held_out": 4}}],
)
def test_another_run_is_not_resumed(
    changes: dict[str, Any], make: Callable[[TrainingConfig], Trainer], tmp_path: Path
) -> None:
    make(tiny_config(tmp_path, run={"steps": 3})).run()
    other = {"run": {"steps": 3} | changes.pop("run", {})} | changes
    with pytest.raises(ValueError, match="step-000003 was made with another configuration or"):
        make(tiny_config(tmp_path, **other)).resume()


def test_other_data_or_processes_are_not_resumed(
    target: LoadedTarget, examples: list[Example], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, run={"steps": 3})
    prepare(config, target, examples, Worker()).trainer.run()
    relabelled = [
        dataclasses.replace(one, is_answer=[True, *one.is_answer[1:]]) for one in examples
    ]
    for others, worker in ((examples[1:], 1), (relabelled, 1), (examples, 2)):
        run = prepare(config, target, others, Worker(0, worker))
        with pytest.raises(ValueError, match="another configuration or other data"):
            run.trainer.resume()


def test_settings_that_do_not_affect_learning_may_change(
    make: Callable[[TrainingConfig], Trainer], tmp_path: Path
) -> None:
    make(tiny_config(tmp_path, run={"steps": 3})).run()
    free = {"log_every": 2, "checkpoint_every": 1, "keep_checkpoints": 5, "max_seconds": 9}
    config = tiny_config(tmp_path, run={"steps": 3} | free, card={"name": "x"})
    assert make(config).resume()


def test_too_few_examples_are_refused(
    make: Callable[[TrainingConfig], Trainer], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"there are 14 examples; data\.held_out 14 would leave"):
        make(tiny_config(tmp_path, data={"held_out": 14}))


def test_a_gradient_that_is_not_finite_changes_no_weight_and_is_counted(
    make: Callable[[TrainingConfig], Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = make(tiny_config(tmp_path, run={"steps": 3}))
    inner, calls = one.objective.__call__, itertools.count()

    class Poisoned(Failing):
        def __call__(self, batch: TrainBatch) -> tuple[Tensor, Tally]:
            loss, tally = inner(batch)
            grows = torch.is_grad_enabled()
            return (loss * math.inf if grows and next(calls) == 1 else loss), tally

    one.objective = Poisoned(one, 0)  # type: ignore[assignment]
    seen: list[dict[str, Tensor]] = []
    one.run(lambda _: seen.append(state(one)))
    assert_same(seen[0], seen[1])
    assert not torch.equal(seen[1]["fc.weight"], seen[2]["fc.weight"])
    counts = [(e.step, e.num_skipped) for e in one.history.entries if e.kind == "train"]
    assert counts == [(1, 0), (2, 1), (3, 1)]
    assert "step 1 has a gradient of norm" in caplog.text
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert [line["gradient_norm"] for line in parsed if line["kind"] == "train"][1] is None
    again = make(tiny_config(tmp_path, run={"steps": 3}))
    again.resume()
    assert again.num_skipped == 1


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "dense"])
def test_every_kind_learns(
    kind: str, make: Callable[[TrainingConfig], Trainer], tmp_path: Path
) -> None:
    run = {"steps": 40, "batch_tokens": 300, "evaluate_every": 40}
    changes = {"optimizer": {"learning_rate": 1e-2, "warmup_steps": 3}}
    one = make(tiny_config(tmp_path, kind, run=run, **changes))
    one.run()
    first, last = [e for e in one.history.entries if e.kind == "held out"]
    trained = [e for e in one.history.entries if e.kind == "train"]
    assert trained[-1].loss < 0.98 * trained[0].loss
    assert last.acceptance_length > first.acceptance_length
    assert one.num_answer_tokens == last.num_answer_tokens > 0
