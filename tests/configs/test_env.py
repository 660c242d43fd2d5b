"""Values read from the process's environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs.env import default_cache_dir, engine_environment, environment, num_cpus


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("/somewhere", "/somewhere/aerie"),
        ("", "/home/me/.cache/aerie"),
        (None, "/home/me/.cache/aerie"),
    ],
)
def test_files_are_cached_where_the_desktop_specification_says(
    monkeypatch: pytest.MonkeyPatch, base: str | None, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if base is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", base)
    assert default_cache_dir() == Path(expected)


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5, 7}, raising=False)
    assert num_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_cpus() == 1


def test_the_engine_gets_no_variable_that_may_hold_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AERIE_SERVER__API_KEYS", "[sk-secret]")
    monkeypatch.setenv("AERIE_server__admin_keys", "[sk-secret]")
    monkeypatch.setenv("OTHER", "kept")
    found = engine_environment()
    assert "sk-secret" not in str(found)
    assert found["OTHER"] == "kept"


def test_variables_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AERIE_SERVER__PORT", "7")
    assert environment()["AERIE_SERVER__PORT"] == "7"


@pytest.mark.parametrize(
    ("content", "expected"),
    [("max 100000", 3), ("100000 100000", 1), ("150000 100000", 2), ("900000 100000", 3), ("", 3)],
)
def test_a_containers_cpu_quota_bounds_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    cpu_max = tmp_path / "cpu.max"
    cpu_max.write_text(content, encoding="ascii")
    assert num_cpus(cpu_max) == expected
    assert num_cpus(tmp_path / "missing") == 3
