"""Which examples are held out, and what a run records for publishing."""

from __future__ import annotations

from pathlib import Path

import pytest

from drafter.heads.untrained import eagle3_config
from drafter.train.data.encoding import Example
from drafter.train.run import prepare, split
from drafter.train.run_record import RunRecord
from drafter.train.trainer import Worker
from kernels.ops import Ops
from tests.support.engines.tiny_engine import random_llama
from tests.support.heads.tiny_training import tiny_config, tiny_target

EXAMPLES = [Example([5, 6 + n % 3, 20 + n], [False, True, True]) for n in range(9)]


def test_every_example_is_trained_on_or_held_out() -> None:
    training, held_out = split(EXAMPLES, 3, seed=0)
    assert len(held_out) == 3
    ids = [one.token_ids[2] for one in (*training, *held_out)]
    assert sorted(ids) == [20 + n for n in range(9)]
    assert ids != sorted(ids)
    assert split(EXAMPLES, 3, seed=0) == (training, held_out)
    assert split(EXAMPLES, 3, seed=1) != (training, held_out)


def test_the_vocabulary_is_counted_in_what_is_trained_on(
    reference_ops: Ops, tmp_path: Path
) -> None:
    target = tiny_target(random_llama(), reference_ops)
    head = {"draft_vocab_size": 6, "aux_layers": [1]}
    config = tiny_config(tmp_path, head=head, data={"held_out": 6})
    run = prepare(config, target, EXAMPLES, Worker())
    training, held_out = split(EXAMPLES, 6, 0)
    used = {token for one in training for token in one.token_ids[1:]}
    assert run.record.target_ids is not None
    assert used <= set(run.record.target_ids)
    assert not {one.token_ids[2] for one in held_out} & set(run.record.target_ids)
    assert run.record.coverage == 1.0
    assert list(run.trainer.corpus.examples) == training
    assert list(run.trainer.held_out.examples) == held_out
    assert not (tmp_path / "history.jsonl").exists()


@pytest.mark.parametrize("ids", [None, [2, 5, 130]])
def test_a_record_is_read_back(ids: list[int] | None, reference_ops: Ops, tmp_path: Path) -> None:
    arch = tiny_target(random_llama(), reference_ops).tensors.arch
    config = eagle3_config(arch, None if ids is None else len(ids))
    record = RunRecord("print", 2, arch, config, ids, None if ids is None else 0.5)
    record.write(tmp_path / "run.json")
    assert RunRecord.read(tmp_path / "run.json") == record


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"fingerprint": 3}'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is not the record of a training run: "):
        RunRecord.read(path)
