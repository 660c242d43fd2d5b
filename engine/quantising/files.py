"""Writes quantised models in the layout of compressed-tensors, which Aerie and vLLM read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engine.checkpoints.checkpoint import INDEX_FILE
from engine.checkpoints.written import write_json, write_tensors_file
from engine.quantising.rounding import LEAST, Float8, FourBits, Grid, Rounded
from kernels.linear.scaled import FP8

Form = Literal["fp8", "int4"]
GROUPS = (128, 64, 32)  # inputs per scale: the first that divides the inputs of a weight
SHARD_BYTES = 5 * 10**9
PER_WORD = 8  # codes of four bits in an int32
_PART = "part-{}.safetensors"  # the name of a file until the number of files is known


def grid_for(form: Form, num_inputs: int, scales: torch.dtype) -> Grid:
    """What weights of so many inputs are rounded to. ValueError if four-bit groups do not fit."""
    if form == "fp8":
        return Float8(scales)
    group = next((group for group in GROUPS if num_inputs % group == 0), None)
    if group is None:
        raise ValueError(f"{num_inputs} inputs do not divide into groups of {GROUPS[-1]}")
    return FourBits(group, scales)


def stored_parts(rounded: Rounded, grid: Grid) -> dict[str, Tensor]:
    """The tensors of a weight by the ends of their names."""
    codes, scales = rounded.codes.cpu(), rounded.scales.cpu()
    if isinstance(grid, Float8):
        return {"weight": codes.to(FP8), "weight_scale": scales.to(grid.dtype)}
    assert isinstance(grid, FourBits)
    return {
        "weight_packed": _words((codes - LEAST).int()),
        "weight_scale": scales.to(grid.dtype),
        "weight_shape": torch.tensor(codes.shape),
    }


def _words(codes: Tensor) -> Tensor:
    """[N, K] of 0 to 15 -> [N, K / 8] int32, the first code in the lowest bits."""
    places = torch.arange(PER_WORD, dtype=torch.int32) * 4
    word = (codes.view(len(codes), -1, PER_WORD) << places).sum(dim=2)  # int64
    return torch.where(word >= 2**31, word - 2**32, word).int()


def quantization_config(form: Form, grids: Mapping[str, Grid], ignored: Iterable[str]) -> Any:
    """For weights by name (without `.weight`). Layers of several group sizes are named."""
    by_group: dict[int | None, list[str]] = defaultdict(list)
    for name, grid in grids.items():
        by_group[grid.group if isinstance(grid, FourBits) else None].append(name)
    several = len(by_group) > 1
    groups = {
        f"group_{number}": _group(group, names if several else ["Linear"])
        for number, (group, names) in enumerate(by_group.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if form == "fp8" else "pack-quantized",
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def _group(group: int | None, targets: list[str]) -> dict[str, Any]:
    """`group`: inputs per scale; None for FP8."""
    common = {"symmetric": True, "dynamic": False}
    if group is None:
        weights = common | {"num_bits": 8, "type": "float", "strategy": "channel"}
        inputs = {"num_bits": 8, "type": "float", "strategy": "token"}
        inputs |= {"symmetric": True, "dynamic": True}
        return {"targets": targets, "weights": weights, "input_activations": inputs}
    weights = common | {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    return {"targets": targets, "weights": weights, "input_activations": None}


@dataclass(slots=True)
class ShardWriter:
    """Writes tensors as they come, into files of at most SHARD_BYTES and one tensor."""

    folder: Path
    _pending: dict[str, Tensor] = field(default_factory=dict)
    _files: list[list[str]] = field(default_factory=list)  # the names in each
    _total: int = 0

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._pending[name] = tensor.contiguous()
            self._total += tensor.nbytes
            if sum(each.nbytes for each in self._pending.values()) >= SHARD_BYTES:
                self._flush()

    def _flush(self) -> None:
        path = self.folder / _PART.format(len(self._files))
        write_tensors_file(path, self._pending)
        self._files.append(list(self._pending))
        self._pending = {}

    def close(self) -> None:
        """Give the files their names, and write their index if there are several."""
        if self._pending:
            self._flush()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files):
            several = f"model-{number + 1:05}-of-{count:05}.safetensors"
            final = "model.safetensors" if count == 1 else several
            (self.folder / _PART.format(number)).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_json(self.folder / INDEX_FILE, index)
