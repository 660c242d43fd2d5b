"""The log of a run is JSON and survives interruption anywhere."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from drafter.train.history import Entry, History, write_whole


def entry(step: int, loss: float = 2.5) -> Entry:
    return Entry("train", step, 10 * step, 0.5, loss, [0.5, 0.25], 1.6, 0.3, 99.0, 1)


def test_entries_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history.jsonl"
    history = History(path)
    for step in (1, 2):
        history.add(entry(step))
    assert History(path).entries == history.entries == [entry(1), entry(2)]
    assert json.loads(path.read_text().splitlines()[0]) == dataclasses.asdict(entry(1))


def test_entries_after_a_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    for step in (1, 2, 3):
        history.add(entry(step))
    history.cut(2)
    history.add(entry(3, loss=9.0))
    assert History(path).entries == history.entries == [entry(1), entry(2), entry(3, loss=9.0)]
    assert [file.name for file in tmp_path.iterdir()] == ["history.jsonl"]


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    history = History(None)
    history.add(entry(1))
    history.cut(0)
    assert history.entries == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).add(entry(1, loss=math.nan))
    History(path).add(entry(2, loss=math.inf))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["loss"] for line in lines] == [None, None]
    assert all(math.isnan(one.loss) for one in History(path).entries)
    assert all(one.sampled_acceptance_length is None for one in History(path).entries)


def test_a_torn_last_line_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).add(entry(1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    history = History(path)
    history.add(entry(2))
    assert History(path).entries == [entry(1), entry(2)]


@pytest.mark.parametrize("line", ["{", "[]", "{}", "3", '{"kind": "train", "more": 1}'])
def test_another_file_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).add(entry(1))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"history\.jsonl:2: not an entry of a training log"):
        History(path)


def test_a_file_is_written_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/file'"):
        write_whole(path, b"new one")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
