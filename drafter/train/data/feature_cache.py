"""Sources of the target's features for a batch: the target itself, or a cache."""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from drafter.train.data.encoding import Example
from drafter.train.data.target import FrozenTarget, TargetFeatures


class FeatureSource(Protocol):
    """Features of examples by number, in this order."""

    def features(self, numbers: Sequence[int]) -> TargetFeatures: ...


@dataclass(frozen=True, slots=True)
class LiveFeatures:
    """Runs the target every time and stores nothing (online distillation)."""

    target: FrozenTarget
    examples: Sequence[Example]

    def features(self, numbers: Sequence[int]) -> TargetFeatures:
        return self.target.features([self.examples[number].token_ids for number in numbers])


class CachedFeatures:
    """Keeps the features of as many examples as fit into `max_bytes`, in memory-mapped files.

    The name of a file is a hash of all that it depends on. So another target or other data never
    uses it, and an interrupted run finds it again. Each example has a checksum, written last: an
    example left incomplete by a killed process or a power failure is computed again.
    """

    def __init__(
        self,
        live: LiveFeatures,
        folder: Path,
        max_bytes: int,
        width: int,
        hidden_size: int,
        dtype: torch.dtype,
        identity: str,
    ) -> None:
        """`width`: size of the taps; `hidden_size`: size of the final norm's output; both have
        `dtype`. `identity`: identifies the target. OSError if the disk cannot hold the files."""
        self._live = live
        lengths = np.array([len(example.token_ids) for example in live.examples], dtype=np.int64)
        costs = lengths * ((width + hidden_size) * dtype.itemsize + 4) + torch.int64.itemsize
        self._starts = np.concatenate(([0], lengths.cumsum()))
        self._num_kept = int(np.searchsorted(costs.cumsum(), max_bytes, side="right"))
        tokens = int(self._starts[self._num_kept])
        name = _fingerprint(live.examples, (identity, str(dtype), str(width), str(tokens)))
        folder.mkdir(parents=True, exist_ok=True)
        self._taps, self._hidden, self._best, self._sums = _mapped(
            {
                folder / f"{name}.taps": ((tokens, width), dtype),
                folder / f"{name}.hidden": ((tokens, hidden_size), dtype),
                folder / f"{name}.best": ((tokens,), torch.int32),
                folder / f"{name}.sums": ((self._num_kept,), torch.int64),  # 0: not stored
            }
        )
        self._trusted: set[int] = set()  # examples that this process wrote or checked

    def features(self, numbers: Sequence[int]) -> TargetFeatures:
        missing = [n for n in numbers if not self._holds(n)]
        fresh = dict(zip(missing, self._run(missing), strict=True)) if missing else {}
        for number, features in fresh.items():
            if number < self._num_kept:
                self._store(number, features)
        return TargetFeatures.join([fresh[n] if n in fresh else self._stored(n) for n in numbers])

    def _run(self, numbers: Sequence[int]) -> list[TargetFeatures]:
        lengths = [len(self._live.examples[number].token_ids) for number in numbers]
        return self._live.features(numbers).split(lengths)

    def _holds(self, number: int) -> bool:
        if number in self._trusted:
            return True
        if number >= self._num_kept or not self._sums[number]:
            return False
        if int(self._sums[number]) != _checksum(self._stored(number)):
            return False
        self._trusted.add(number)
        return True

    def _store(self, number: int, features: TargetFeatures) -> None:
        stored = self._stored(number)
        stored.taps.copy_(features.taps)
        stored.hidden.copy_(features.hidden)
        stored.best.copy_(features.best)
        self._sums[number] = _checksum(stored)
        self._trusted.add(number)

    def _stored(self, number: int) -> TargetFeatures:
        here = slice(int(self._starts[number]), int(self._starts[number + 1]))
        return TargetFeatures(self._taps[here], self._hidden[here], self._best[here])


def _checksum(features: TargetFeatures) -> int:
    """Never 0."""
    found = 0
    for part in (features.taps, features.hidden, features.best):
        found = zlib.crc32(part.view(torch.uint8).numpy().data, found)
    return found | 1 << 32


def _mapped(files: Mapping[Path, tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    """A tensor in each file, of the given shape and dtype; zeros where the file is new."""
    _allocate({path: math.prod(shape) * dtype.itemsize for path, (shape, dtype) in files.items()})
    return [
        torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        for path, (shape, dtype) in files.items()
    ]


def _allocate(sizes: Mapping[Path, int]) -> None:
    """Reserve the space of all files at once: if the disk filled up later, the process would be
    killed instead of raising OSError. If there is no room, new files are removed."""
    new = [path for path in sizes if not path.exists()]
    path = Path()
    try:
        for path, size in sizes.items():
            with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, size))
    except OSError as error:
        for one in new:
            one.unlink(missing_ok=True)
        needed = f"no room for a feature cache of {sum(sizes.values())} bytes: {error.strerror}"
        raise OSError(error.errno, needed, str(path)) from error


def _fingerprint(examples: Sequence[Example], facts: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join(facts).encode())
    for example in examples:
        digest.update(np.asarray(example.token_ids, dtype=np.int32).tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:16]
