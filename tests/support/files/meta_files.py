"""Files of published checkpoints without their numbers: names, types and shapes, and which parts of
each tensor were read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drafter import head_files
from engine.checkpoints import checkpoint

DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
}
Box = tuple[tuple[int, int], ...]  # the first index and the one after the last, of each axis
Shape = tuple[int, ...]


@dataclass(frozen=True)
class MetaTensor:
    """A tensor of a file: read on the device `meta`, unless it has values."""

    dtype: str
    shape: Shape
    values: Tensor | None = None
    reads: list[Box] = field(default_factory=list)

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> Tensor:
        taken = self._box(index)
        self.reads.append(taken)
        if self.values is not None:
            return self.values[tuple(slice(*each) for each in taken)]
        return blank(tuple(stop - start for start, stop in taken), self.dtype)

    def _box(self, index: Any) -> Box:
        given = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
        parts = [*given, *[slice(None)] * (len(self.shape) - len(given))]
        bounds = [part.indices(size) for part, size in zip(parts, self.shape, strict=True)]
        assert all(step == 1 for _, _, step in bounds)
        return tuple((start, stop) for start, stop, _ in bounds)


@cache
def blank(shape: Shape, dtype: str) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


@dataclass(frozen=True)
class MetaFile:
    """As `safetensors.safe_open` gives."""

    tensors: dict[str, MetaTensor]

    def keys(self) -> Iterator[str]:
        return iter(self.tensors)

    def get_slice(self, name: str) -> MetaTensor:
        return self.tensors[name]


class MetaFolders:
    """Directories of checkpoints whose weights are such files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._files: dict[Path, MetaFile] = {}
        for module in (checkpoint, head_files):
            monkeypatch.setattr(module, "safe_open", self._open)

    def _open(self, path: Path, **_: object) -> MetaFile:
        return self._files[path]

    def write(self, folder: Path, config: dict[str, Any], tensors: dict[str, MetaTensor]) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        weights = folder / "model.safetensors"
        weights.touch()
        self._files[weights] = MetaFile(tensors)


def times_read(tensors: dict[str, MetaTensor]) -> dict[str, set[int]]:
    """How often the numbers of each tensor were read: {1} if each was once."""
    return {name: _counts(each.shape, tuple(each.reads)) for name, each in tensors.items()}


@cache
def _counts(shape: Shape, boxes: tuple[Box, ...]) -> set[int]:
    """Of a grid that is cut wherever a box begins or ends."""
    cuts = [sorted({0, size, *_edges(boxes, axis)}) for axis, size in enumerate(shape)]
    counts = np.zeros([len(each) - 1 for each in cuts], dtype=int)
    for box, number in Counter(boxes).items():
        places = zip(box, cuts, strict=True)
        counts[tuple(slice(at.index(start), at.index(stop)) for (start, stop), at in places)] += (
            number
        )
    return set(counts.flat)


def _edges(boxes: Sequence[Box], axis: int) -> set[int]:
    return {edge for box in boxes for edge in box[axis]}
