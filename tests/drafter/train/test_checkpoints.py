"""A checkpoint is complete or does not exist."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from drafter.train import checkpoints
from drafter.train.checkpoints import CheckpointFolder, Progress, load_checkpoint

FILES = ("weights.safetensors", "optimizer.safetensors", "progress.json")


def save(folder: Path, step: int, keep: int = 2) -> None:
    weights = {"w": torch.full((4, 3), float(step)).T}  # not contiguous
    state = {"w.exp_avg": torch.ones(2), "w.step": torch.tensor(float(step))}
    progress = Progress(step, 10 * step, 1.5, "print", 1)
    CheckpointFolder(folder, keep).save(progress, weights, state)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / "run" / "checkpoints", 7)
    path = CheckpointFolder(tmp_path / "run" / "checkpoints", 2).latest()
    assert path is not None
    progress, weights, state = load_checkpoint(path)
    assert progress == Progress(7, 70, 1.5, "print", 1)
    assert torch.equal(weights["w"], torch.full((3, 4), 7.0))
    assert state["w.step"].shape == ()
    assert float(state["w.step"]) == 7


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    assert CheckpointFolder(tmp_path / "none", 2).latest() is None
    for step in (9, 999_999, 1_000_000, 1_000_001):  # by number, not by name
        save(tmp_path, step)
    (tmp_path / "step-notes").mkdir()
    names = ["step-1000000", "step-1000001", "step-notes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert folder.latest() == tmp_path / "step-1000001"


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "step-000003" / "weights.safetensors").write_bytes(b"")
    save(tmp_path, 3)
    load_checkpoint(tmp_path / "step-000003")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".step-x" / "new").mkdir(parents=True)
    assert CheckpointFolder(tmp_path, 2).latest() is None
    save(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("broken", FILES)
@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_file_is_named(broken: str, missing: bool, tmp_path: Path) -> None:
    save(tmp_path, 3)
    file = tmp_path / "step-000003" / broken
    if missing:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{broken} is damaged: .*remove .*step-000003") as caught:
        load_checkpoint(tmp_path / "step-000003")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{}", '{"step": 1, "more": 2}'])
def test_another_progress_file_is_refused(text: str, tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "step-000003" / "progress.json").write_text(text)
    with pytest.raises(ValueError, match=r"progress\.json is damaged"):
        load_checkpoint(tmp_path / "step-000003")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("full")])
@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_leaves_what_was_there(
    file: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 3, keep=1)
    before = contents(tmp_path)
    real_save, real_write = checkpoints.save_file, Path.write_text

    def fill(path: Path) -> None:
        if path.name == file:
            path.write_bytes(b"half")
            raise error

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        fill(path)
        real_save(tensors, path)

    def write_text(path: Path, text: str, **options: str) -> int:
        fill(path)
        return real_write(path, text, **options)

    monkeypatch.setattr(checkpoints, "save_file", save_file)
    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match="step-000004 cannot be written: "):
        save(tmp_path, 4, keep=1)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
    monkeypatch.undo()
    save(tmp_path, 4, keep=1)
    load_checkpoint(tmp_path / "step-000004")
    shutil.rmtree(tmp_path)
