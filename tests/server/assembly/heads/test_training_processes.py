"""`aerie train-draft` in several processes, started by torchrun."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from drafter.train.history import History
from tests.support.heads.training_commands import arguments, train, weights_of, write_model_and_data
from tests.support.machine.threads import own_torch_threads
from tests.support.servers.live_server import aerie_command, child_environment
from tests.support.waiting import DEADLINE

pytestmark = pytest.mark.timeout(4 * DEADLINE)  # three interpreters import torch


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    with own_torch_threads():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_data(tmp_path_factory.mktemp("model"))


def torchrun(words: list[str], empty: Path) -> subprocess.CompletedProcess[str]:
    empty.touch()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _, *command = aerie_command("train-draft", "--config", str(empty), *words)
    return subprocess.run(
        [sys.executable, *launch, *command],
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE,
        check=False,
        env=child_environment({"OMP_NUM_THREADS": "1"}),
    )


def test_two_processes_equal_one_with_twice_the_accumulation(
    folder: Path, native_cache: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(folder, native_cache, one, run__accumulation=2).exit_code == 0
    done = torchrun(arguments(folder, native_cache, two), tmp_path / "empty.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(two / "head")) == 1
    expected = weights_of(one)
    for name, tensor in weights_of(two).items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-5), name
    entries = [History(path / "history.jsonl").entries for path in (one, two)]
    counts = [[(e.kind, e.step, e.num_answer_tokens) for e in some] for some in entries]
    assert counts[0] == counts[1]


@pytest.mark.extended  # ends three interpreters that import torch, to see what torchrun does
def test_a_process_that_fails_ends_the_others(
    folder: Path, native_cache: Path, tmp_path: Path
) -> None:
    """Only the first process writes, so only it fails at a file in the place of checkpoints."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    words = arguments(folder, native_cache, tmp_path / "run", run__steps=100_000)
    done = torchrun(words, tmp_path / "empty.yaml")
    assert done.returncode == 1
    assert any(line.startswith("aerie: [Errno 17]") for line in done.stderr.splitlines())
