"""How much memory a cache may take, according to /proc and cgroup v2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.kv import sizing

CPU = torch.device("cpu")
MEMINFO = "MemTotal:       16000 kB\nMemFree:          100 kB\nMemAvailable:    2000 kB\n"
AVAILABLE = 2000 * 1024


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `meminfo`, and `cgroup` with the files that a test writes."""
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(sizing, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(sizing, "CGROUP", tmp_path / "cgroup")
    return tmp_path


def limit(machine: Path, **files: str) -> None:
    for name, text in files.items():
        (machine / "cgroup" / f"memory.{name}").write_text(text)


def test_without_a_limit_all_available_memory_counts(machine: Path) -> None:
    assert sizing.free_bytes(CPU) == AVAILABLE


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"max": "max\n", "current": "500\n"}, AVAILABLE),
        ({"max": "1000\n", "current": "400\n"}, 600),
        ({"max": "1000\n", "current": "1000\n"}, 0),
        ({"max": "1000\n", "current": "1001\n"}, 0),
        ({"max": "99999999999\n", "current": "0\n"}, AVAILABLE),  # the machine has less
        ({"max": "1000\n"}, AVAILABLE),
        ({"current": "1000\n"}, AVAILABLE),
        ({"max": "1000\n", "current": "\n"}, AVAILABLE),
    ],
    ids=["max", "room", "full", "over", "larger-than-the-machine", "no-use", "no-limit", "empty"],
)
def test_a_containers_limit_counts_where_it_is_less(
    machine: Path, files: dict[str, str], free: int
) -> None:
    limit(machine, **files)
    assert sizing.free_bytes(CPU) == free


@pytest.mark.parametrize(
    ("stat", "free"),
    [
        ("anon 100\nfile 350\ninactive_file 300\nactive_file 50\n", 900),
        ("anon 100\n", 600),
        ("", 600),
    ],
)
def test_cached_files_do_not_count_as_used(machine: Path, stat: str, free: int) -> None:
    limit(machine, max="1000\n", current="400\n", stat=stat)
    assert sizing.free_bytes(CPU) == free


def test_a_kernel_without_memavailable_is_a_clear_error(machine: Path) -> None:
    (machine / "meminfo").write_text("MemTotal: 16000 kB\n")
    with pytest.raises(OSError, match="meminfo has no MemAvailable"):
        sizing.free_bytes(CPU)


def test_this_machine_has_some_free_memory() -> None:
    assert sizing.free_bytes(CPU) > 2**20
