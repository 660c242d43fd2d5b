"""Checkpoints of a training run: all that a resumed run needs to continue as if never stopped."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, OPTIMIZER, PROGRESS = "weights.safetensors", "optimizer.safetensors", "progress.json"
SCRATCH = ".step-"  # prefix of folders that are being written


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come. Seed and step alone determine order and noise of the data."""

    step: int  # optimizer steps done
    num_answer_tokens: int  # learnt from, over all processes
    seconds: float  # of training, before and after interruptions
    fingerprint: str  # of configuration and data: another run must not resume from here
    num_skipped: int = 0  # steps whose gradient was not finite


class CheckpointFolder:
    """A run's folder of step-NNNNNN directories. Each appears complete or not at all."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self._keep = keep

    def save(
        self, progress: Progress, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> None:
        """Write a checkpoint, then drop the oldest beyond `keep`. After an OSError (such as a full
        disk) earlier ones are unchanged, and nothing half-written remains."""
        self.path.mkdir(parents=True, exist_ok=True)
        for torn in self.path.glob(f"{SCRATCH}*"):  # left by a killed process
            shutil.rmtree(torn)
        target = self.path / f"step-{progress.step:06d}"
        with tempfile.TemporaryDirectory(dir=self.path, prefix=SCRATCH) as scratch:
            folder = Path(scratch) / "new"
            folder.mkdir()
            try:
                save_file({n: t.contiguous() for n, t in weights.items()}, folder / WEIGHTS)
                save_file({n: t.contiguous() for n, t in optimizer.items()}, folder / OPTIMIZER)
                text = json.dumps(asdict(progress), indent=1)
                (folder / PROGRESS).write_text(text + "\n", encoding="utf-8")
            except (OSError, SafetensorError) as error:
                raise OSError(f"{target} cannot be written: {error}") from error
            if target.exists():
                target.rename(Path(scratch) / "old")
            folder.rename(target)
        for old in self._all()[: -self._keep]:
            shutil.rmtree(old)

    def latest(self) -> Path | None:
        """The newest checkpoint, if there is one."""
        found = self._all()
        return found[-1] if found else None

    def _all(self) -> list[Path]:
        found = [path for path in self.path.glob("step-*") if path.name[5:].isdecimal()]
        return sorted(found, key=lambda path: int(path.name[5:]))


def load_checkpoint(path: Path) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]]:
    """Progress, weights and optimizer state. A ValueError names the bad file."""
    return load_progress(path), _tensors(path / WEIGHTS), _tensors(path / OPTIMIZER)


def load_progress(path: Path) -> Progress:
    """The progress at a checkpoint. A ValueError names the bad file."""
    file = path / PROGRESS
    try:
        return Progress(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(file, error) from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """The float32 weights of a checkpoint. A ValueError names the bad file."""
    return _tensors(path / WEIGHTS)


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file} is damaged: {error}; remove {file.parent} to resume from an earlier checkpoint"
    )
