"""A draft head's directory: config.json and .safetensors files, checked before they are read."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.files import check_regular
from drafter.manifest import DTYPES, FLOATS, HeadTensors, common_name, is_harmless
from engine.checkpoints.arch import Shape
from engine.checkpoints.checkpoint import INDEX_FILE, read_json
from engine.checkpoints.stored import Index

logger = logging.getLogger(__name__)

CONVERT = (
    "loading a pickle can run code. Where you trust it, convert it once: "
    "safetensors.torch.save_file({{name: tensor.contiguous() for name, tensor in "
    "torch.load({name!r}, weights_only=True).items()}}, 'model.safetensors')"
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    path: Path
    name: str  # in the file
    handle: Any  # safetensors' open file, memory mapped

    @property
    def shape(self) -> Shape:
        return tuple(self.handle.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""
        return str(self.handle.get_slice(self.name).get_dtype())

    def read(self) -> Tensor:
        tensor: Tensor = self.handle.get_tensor(self.name)
        return tensor

    def __getitem__(self, index: Index) -> Tensor:
        part: Tensor = self.handle.get_slice(self.name)[index]
        return part

    def __str__(self) -> str:
        return f"{self.path}: tensor {self.name}"


def read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory under its common name. Shards need no index, but those that
    an index names must be there."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise _no_safetensors(folder)
    _check_index(folder, {path.name for path in paths})
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for stored in _open(path):
            name = common_name(stored.name)
            if name in tensors:
                raise ValueError(f"{stored} is the same as {tensors[name]}")
            tensors[name] = stored
    return tensors


def _check_index(folder: Path, present: Collection[str]) -> None:
    index = folder / INDEX_FILE
    named = read_json(index).get("weight_map", {}).values() if index.is_file() else ()
    for name in sorted(set(named) - set(present)):
        raise ValueError(f"{index} names the shard {name!r}, which is not in {folder}")


def check_tensors(expected: HeadTensors, found: dict[str, StoredTensor], folder: Path) -> None:
    """Raise ValueError unless `found` is what a head needs. Tensors that no head needs may
    be there, too."""
    for name, shape in expected.required.items():
        if name not in found:
            raise ValueError(f"{folder}: missing tensor {name}, of shape {list(shape)}")
    known = expected.required | expected.optional
    for name, stored in found.items():
        if name in known:
            _check(stored, known[name], DTYPES.get(name, FLOATS))
        elif is_harmless(name):
            logger.info("%s is ignored: the head does not need it", stored)
        else:
            raise ValueError(f"{stored} is unexpected")


def _check(stored: StoredTensor, shape: Shape, dtypes: tuple[str, ...]) -> None:
    if stored.shape != shape:
        raise ValueError(
            f"{stored} has shape {list(stored.shape)}, "
            f"the configuration and the target ask for {list(shape)}"
        )
    if stored.dtype not in dtypes:
        raise ValueError(f"{stored} is {stored.dtype}; supported are {', '.join(dtypes)}")


def _open(path: Path) -> list[StoredTensor]:
    handle: Any
    check_regular(path)  # to open a pipe would wait for ever, with the interpreter's lock
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    return [StoredTensor(path, name, handle) for name in handle.keys()]  # noqa: SIM118


def _no_safetensors(folder: Path) -> ValueError:
    pickled = sorted(p for kind in ("bin", "pt", "pth") for p in folder.glob(f"*.{kind}"))
    if not pickled:
        return ValueError(f"{folder} holds no .safetensors file")
    name = pickled[0].name
    return ValueError(f"{folder} holds {name} only, and {CONVERT.format(name=name)}")
