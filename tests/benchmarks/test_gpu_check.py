"""The GPU check: it skips without a GPU, keeps results, and its exit code reports failures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import group as gpu_group
from benchmarks.gpu.parts import Part
from benchmarks.gpu_check import check, failed_tests
from benchmarks.measuring.bars import Verdict
from engine.parallel.distributed import DistributedGroup
from tests.support.waiting import DEADLINE

BARS = [Verdict("a", 1.0, 0.5).as_json(), Verdict("b", 1.0, 2.0).as_json()]
BARS += [Verdict("c", 50.0, None).as_json()]


def part(name: str, **found: object) -> Part:
    code = f"print('RESULT ' + {json.dumps(found)!r})"
    return Part(name, (sys.executable, "-c", code), DEADLINE)


def test_without_a_gpu_it_says_so_and_succeeds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 0
    assert capsys.readouterr().out == "skipped: no CUDA device\n"


def test_parts_are_listed_on_any_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == list(gpu_check.INSIDE)
    assert [part.name for part in gpu_check.PARTS] == names
    assert [part.command[-2:] for part in gpu_check.PARTS] == [("--inside", n) for n in names]


def test_an_unknown_part_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--part", "nothing"])
    assert "8B step" in capsys.readouterr().err


def test_missed_bars_are_printed_and_are_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    assert check([part("speeds", bars=BARS)], path, tmp_path / "logs", {"device": "x"}) == 0
    out = capsys.readouterr().out.splitlines()
    assert "kept          0.50  at most 1.00    a" in out
    assert "MISSED        2.00  at most 1.00    b" in out
    assert "NO VALUE            at most 50.00   c" in out
    content = json.loads(path.read_text())
    assert content["machine"] == {"device": "x"}
    assert content["parts"]["speeds"]["bars"] == BARS


def test_a_failed_part_is_the_exit_code_and_the_others_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    both = [part("tests", failed=["one"]), part("speeds", x=1)]
    assert check(both, path, tmp_path / "logs", {}) == 1
    assert "FAILED tests: one" in capsys.readouterr().out
    assert check([part("tests", y=2)], path, tmp_path / "logs", {}) == 0  # runs this part again
    found = json.loads(path.read_text())["parts"]
    assert (found["tests"]["y"], found["tests"]["failed"], found["speeds"]["x"]) == (2, [], 1)
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_file_of_earlier_findings_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text("{")
    assert check([part("speeds", x=1)], path, tmp_path / "logs", {}) == 0
    assert list(json.loads(path.read_text())["parts"]) == ["speeds"]


@pytest.mark.parametrize(
    ("code", "out", "failed"),
    [
        (0, "12 passed", []),
        (5, "no tests ran", []),
        (1, "FAILED a::b - x\nERROR c\n2 failed", ["FAILED a::b - x", "ERROR c"]),
        (4, "usage", ["test_x.py: pytest exits with 4: usage"]),
        (-11, "", ["test_x.py: pytest exits with -11: "]),
    ],
)
def test_failures_of_pytest_are_read(code: int, out: str, failed: list[str]) -> None:
    run = subprocess.CompletedProcess([], code, out, "")
    assert failed_tests("test_x.py", run) == failed


def test_kernel_tests_are_those_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def record(path: Path) -> subprocess.CompletedProcess[str]:
        ran.append(path.name)
        return subprocess.CompletedProcess([], 0, "1 passed", "")

    monkeypatch.setattr(gpu_check, "_run_tests", record)
    assert gpu_check.kernel_tests()["failed"] == []
    assert {"test_triton_attention.py", "test_triton_tree.py"} <= set(ran)
    assert "test_triton_sm90.py" not in ran


def test_the_command_is_in_the_makefile() -> None:
    makefile = Path(gpu_check.ROOT, "Makefile").read_text(encoding="utf-8")
    assert "gpu-check:" in makefile
    assert "-m benchmarks.gpu_check" in makefile


def test_a_collective_of_one_rank_that_changes_something_is_reported(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    group = DistributedGroup.join(tmp_path / "store", 0, 1, cpu, DEADLINE)
    operations = gpu_group.collectives(group)
    assert set(operations) == {"all_reduce", "stack", "to_owners", "from_first"}
    assert gpu_group.changes(operations, cpu) == []
    found = gpu_group.changes({**operations, "wrong": lambda x: 2 * x}, cpu)
    assert found == [f"wrong, {size} bytes: another tensor" for size in gpu_group.SIZES]
