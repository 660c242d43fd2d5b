"""The log of a run: JSON lines. A number that is not finite is written as null."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Entry:
    """The results of one step, or of one measurement on held-out examples."""

    kind: str  # "train" or "held out"
    step: int
    num_answer_tokens: int  # learnt from so far
    seconds: float  # of training so far
    loss: float  # of loss.kind, per predicted token, mean over unrolled steps
    accuracy: list[float]  # [L] share of drafts that are the target's likeliest token
    acceptance_length: float  # of a chain of L greedy drafts, the bonus counted
    gradient_norm: float
    tokens_per_second: float  # answer tokens learnt from
    num_skipped: int = 0  # steps so far that changed no weight, since the gradient was not finite
    sampled_acceptance_length: float | None = None  # at temperature 1, of measurements


class History:
    """Entries in order of their steps, in memory and in a file (or in memory alone)."""

    def __init__(self, path: Path | None) -> None:
        """Read the file's entries; a torn last line, left by a killed process, is ignored.
        ValueError if the file holds anything else."""
        self._path = path
        self.entries: list[Entry] = []
        if path is not None and path.exists():
            *lines, torn = path.read_bytes().split(b"\n")
            self.entries = [_read(path, n, line) for n, line in enumerate(lines, 1)]
            if torn:
                self._rewrite(path)

    def add(self, entry: Entry) -> None:
        """If the file cannot be written, an OSError names it."""
        self.entries.append(entry)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(_line(entry))
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from error

    def cut(self, step: int) -> None:
        """Drop entries after `step`: a resumed run writes them again."""
        self.entries = [entry for entry in self.entries if entry.step <= step]
        if self._path is not None and self._path.exists():
            self._rewrite(self._path)

    def _rewrite(self, path: Path) -> None:
        write_whole(path, "".join(map(_line, self.entries)).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, complete or not at all. If that fails, an OSError names it."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _line(entry: Entry) -> str:
    fields = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(entry).items()
    }
    return json.dumps(fields, allow_nan=False) + "\n"


def _read(path: Path, number: int, line: bytes) -> Entry:
    try:
        fields = json.loads(line).items()
        known: dict[str, Any] = {
            name: math.nan if x is None and name != "sampled_acceptance_length" else x
            for name, x in fields
        }
        return Entry(**known)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}:{number}: not an entry of a training log: {error}") from error
