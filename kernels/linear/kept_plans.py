"""The fastest kernels for products, measured once per machine and kept in the cache folder.

A file that cannot be read or written costs only measuring again; the log says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kernels.ops import LinearWeight

CUBLAS = "cublas"

logger = logging.getLogger(__name__)


class Shape(NamedTuple):
    """Of a product."""

    inputs: int
    outputs: int  # of the operation; with `gated`, the weight has twice as many
    gated: bool
    dtype: str
    has_bias: bool

    @classmethod
    def of(cls, weight: LinearWeight, *, gated: bool) -> Shape:
        outputs = weight.out_features // (2 if gated else 1)
        dtype = str(weight.data.dtype).removeprefix("torch.")
        return cls(weight.in_features, outputs, gated, dtype, weight.bias is not None)

    def __str__(self) -> str:
        bias = ", bias" if self.has_bias else ""
        name = "gated_linear" if self.gated else "linear"
        return f"{name} {self.inputs} to {self.outputs}{bias}"


@dataclass(frozen=True, slots=True)
class Choice:
    """What computes a product of few rows."""

    plan: str  # the name of a plan, or CUBLAS
    micros: Mapping[str, float]  # of every plan that was measured, and of cuBLAS

    def __str__(self) -> str:
        times = [f"{self.plan}: {self.micros[self.plan]:.1f} us"]
        if self.plan != CUBLAS:
            times.append(f"cublas: {self.micros[CUBLAS]:.1f} us")
        return ", ".join(times)


@dataclass(frozen=True, slots=True)
class KeptPlans:
    """The file of a machine."""

    folder: Path | None  # None: nothing is kept
    identity: str  # of all that times depend on, except the shape
    names: Collection[str]  # what can be chosen

    def load(self) -> dict[Shape, Choice]:
        """What was measured before."""
        if self.folder is None:
            return {}
        try:
            entries = json.loads(self._path(self.folder).read_text(encoding="utf-8"))
            return dict(map(self._parsed, entries))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("the times of products in %s cannot be used: %s", self.folder, error)
            return {}

    def save(self, choices: Mapping[Shape, Choice]) -> None:
        """For the next start. Readers see the whole file or the one before."""
        if self.folder is None:
            return
        path = self._path(self.folder)
        entries = [
            {"shape": list(shape), "plan": choice.plan, "micros": dict(choice.micros)}
            for shape, choice in choices.items()
        ]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix="writing-")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(entries, file)
            Path(name).replace(path)
        except OSError as error:
            logger.warning("the times of products cannot be kept in %s: %s", path, error)

    def _path(self, folder: Path) -> Path:
        key = repr((self.identity, sorted(self.names)))
        return folder / "products" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _parsed(self, entry: Any) -> tuple[Shape, Choice]:
        """ValueError, TypeError or KeyError if it is not what `save` writes."""
        inputs, outputs, gated, dtype, has_bias = entry["shape"]
        choice = Choice(entry["plan"], entry["micros"])
        if choice.plan not in self.names or not {choice.plan, CUBLAS} <= choice.micros.keys():
            raise ValueError(f"{choice.plan!r} is not one of {', '.join(self.names)}")
        if not all(isinstance(time, float) and 0 < time < 1e9 for time in choice.micros.values()):
            raise ValueError(f"{choice.micros} are not microseconds")
        return Shape(int(inputs), int(outputs), bool(gated), str(dtype), bool(has_bias)), choice
