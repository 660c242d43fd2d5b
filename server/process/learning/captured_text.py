"""Captured shards as text to learn from: which are new, which lines are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = 8  # one sequence of so many is held out, always the same ones
MOST_MEASURED = 64  # held-out sequences, the newest
LEAST_MEASURED = 2


@dataclass(frozen=True, slots=True)
class Prepared:
    """Two files of lines, as `data.conversations` and `data.measure_on` take them."""

    training: Path
    held_out: Path
    num_training: int
    num_held_out: int

    @property
    def is_enough(self) -> bool:
        return self.num_training > 0 and self.num_held_out >= LEAST_MEASURED


def complete_shards(folder: Path) -> list[Path]:
    """The complete shards, the oldest first."""
    return sorted(folder.glob("captured-*.jsonl"))


def prepare(shards: Sequence[Path], folder: Path) -> Prepared:
    """Write the lines of `shards` to two files in `folder`. A line is held out or not by its
    content alone, so no head ever learns from one that it is measured on. OSError if that fails."""
    training: list[bytes] = []
    held_out: list[bytes] = []
    for shard in shards:
        for line in shard.read_bytes().splitlines(keepends=True):
            (held_out if _is_held_out(line) else training).append(line)
    held_out = held_out[-MOST_MEASURED:]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = Prepared(
        folder / "training.jsonl", folder / "held-out.jsonl", len(training), len(held_out)
    )
    for path, lines in ((found.training, training), (found.held_out, held_out)):
        path.touch(mode=0o600)
        path.write_bytes(b"".join(lines))
    return found


def _is_held_out(line: bytes) -> bool:
    return hashlib.blake2b(line.strip(), digest_size=8).digest()[0] % HELD_OUT == 0
