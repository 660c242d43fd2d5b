"""Weights on disk under their Hugging Face names, whatever the file format."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.files import check_regular, read_text
from engine.checkpoints.arch import LlamaArch, Shape, bos_token_id, eos_token_ids
from engine.checkpoints.cache_scales import read_cache_scales, scale_names
from engine.checkpoints.families import TextModel, read_text_model
from engine.checkpoints.gguf_files.checkpoint import GGUFCheckpoint
from engine.checkpoints.llama4_arch import with_stored_experts
from engine.checkpoints.manifest import (
    EMBEDDING,
    LM_HEAD,
    check_manifest,
    expected_tensors,
    listed,
)
from engine.checkpoints.quantised.config import Quantisation, read_quantisation
from engine.checkpoints.quantised.weights import QuantisedTensor, QuantisedWeights
from engine.checkpoints.source import BUNDLED_ALIAS, ModelFiles, config_folder, resolve_source
from engine.checkpoints.stored import Stored
from kernels.linear.quantised import dense
from kernels.ops import CacheScales

SUPPORTED_DTYPES = ("F32", "F16", "BF16")
SINGLE_FILE = "model.safetensors"
MAX_JSON = 2**24  # bytes; parsing holds up all other threads
INDEX_FILE = "model.safetensors.index.json"
COMPARED_ROWS = 4096  # rows of a vocabulary per comparison

Shards = dict[str, tuple[Path, Any]]  # tensor name -> its file's path and open handle

logger = logging.getLogger(__name__)


class Checkpoint(Protocol):
    """A checked model on disk: it has every tensor of `expected_tensors(arch)` in its shape."""

    @property
    def arch(self) -> LlamaArch: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def bos_token_id(self) -> int | None: ...

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU in its stored dtype (float32 if it was quantised). KeyError if
        the model has no such tensor."""
        ...

    def stored(self, name: str) -> Stored:
        """One tensor that is read from disk as it is indexed, only the indexed part. From a .gguf
        file the whole tensor is read, as its rows are permuted; quantised ones stay so."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the model, read one at a time."""
        ...

    def cache_scales(self) -> dict[int, CacheScales]:
        """Of keys and values in FP8, by layer; empty if the model has none. ValueError for scales
        that are not one number for a layer."""
        ...


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """Check a model's files against its own configuration, without reading weights.

    Raises ValueError naming the file and, if one is at fault, the tensor.
    """
    if files.kind == "gguf":
        return GGUFCheckpoint(files.path)
    return SafetensorsCheckpoint(files.path)


def read_arch(source: str, revision: str | None = None) -> LlamaArch:
    """The architecture of a model (see `source.ACCEPTED`), whose weights need not be on this
    machine. Raises FileNotFoundError or ValueError as `resolve_source` and `open_checkpoint`."""
    if source == BUNDLED_ALIAS or source.endswith(".gguf"):
        return open_checkpoint(resolve_source(source, revision)).arch
    path = config_folder(source, revision) / "config.json"
    try:
        return read_text_model(read_json(path)).arch
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class SafetensorsCheckpoint:
    """A Hugging Face directory: config.json plus one .safetensors file or an index of shards."""

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        generation_config = read_json(generation) if generation.is_file() else None
        try:
            text = read_text_model(config)
            self.eos_token_ids = eos_token_ids(text.config, generation_config)
            self.bos_token_id = bos_token_id(text.config)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
        self.arch = text.arch
        self._prefix = text.prefix
        self._shards = _text_tensors(self._open_shards(_shard_paths(folder)), text, folder)
        self._cache_scales = self._take_cache_scales(folder)
        self._quantised = self._take_quantised(read_quantisation(text.config), folder)
        self.arch = replace(self.arch, tie_word_embeddings=self._is_tied(folder))
        self.arch = with_stored_experts(self.arch, self._names())
        check_manifest(self.arch, self._shapes(), folder)

    def _take_cache_scales(self, folder: Path) -> dict[str, Any]:
        """Their tensors leave the others."""
        views = {name: self._slice(name) for name in scale_names(self._shards)}
        for name in views:
            del self._shards[name]
        if views:
            logger.info("%s: %s are used with cache.dtype=fp8", folder, listed(list(views)))
        return views

    def cache_scales(self) -> dict[int, CacheScales]:
        return read_cache_scales(self._cache_scales)

    def _take_quantised(
        self, quantisation: Quantisation | None, folder: Path
    ) -> dict[str, QuantisedTensor]:
        """The quantised weights; their tensors leave the plain ones."""
        if quantisation is None:
            return {}
        views = {name: self._slice(name) for name in self._shards}
        found = QuantisedWeights.of(views, quantisation, self._prefix, folder)
        for name in found.used:
            del self._shards[name]
        return found.weights

    def _names(self) -> set[str]:
        return self._shards.keys() | self._quantised.keys()

    def _is_tied(self, folder: Path) -> bool:
        """Whether the embedding is the LM head. The tensors decide, as in transformers: a config
        may say that the two are tied although the file has another head, or the reverse."""
        tied = self.arch.tie_word_embeddings
        if LM_HEAD in self._quantised:
            return False
        if LM_HEAD not in self._shards:
            if not tied:
                logger.warning(
                    "%s: tie_word_embeddings is false, but there is no %s: the embedding is used "
                    "in its place",
                    folder,
                    LM_HEAD,
                )
            return True
        if tied and not self._same(LM_HEAD, EMBEDDING):
            logger.warning(
                "%s: tie_word_embeddings is true, but %s differs from %s and is used",
                folder,
                LM_HEAD,
                EMBEDDING,
            )
            return False
        return tied

    def _same(self, name: str, other: str) -> bool:
        """Whether two matrices are equal; true if one of them is not in the files."""
        if name not in self._shards or other not in self._shards:
            return True
        left, right = self._slice(name), self._slice(other)
        if left.get_shape() != right.get_shape():
            return False
        starts = range(0, left.get_shape()[0], COMPARED_ROWS)
        rows = (slice(start, start + COMPARED_ROWS) for start in starts)
        return all(torch.equal(left[part].float(), right[part].float()) for part in rows)

    @staticmethod
    def _open_shards(paths: list[Path]) -> Shards:
        """All tensors of the files, memory mapped."""
        shards: Shards = {}
        handle: Any
        for path in paths:
            check_regular(path)
            try:
                handle = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is damaged or truncated: {error}") from error
            for name in handle.keys():  # noqa: SIM118  (a handle is not a dict)
                if name in shards:
                    raise ValueError(f"{path}: tensor {name} is also in {shards[name][0]}")
                shards[name] = (path, handle)
        return shards

    def _shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {name: one.shape for name, one in self._quantised.items()}
        for name, (path, _) in self._shards.items():
            view = self._slice(name)
            if view.get_dtype() not in SUPPORTED_DTYPES:
                raise ValueError(
                    f"{path}: tensor {name} is {view.get_dtype()}; "
                    f"supported are {', '.join(SUPPORTED_DTYPES)}"
                )
            shapes[name] = tuple(view.get_shape())
        return shapes

    def _slice(self, name: str) -> Any:
        return self._shards[name][1].get_slice(self._prefix + name)

    def tensor(self, name: str) -> Tensor:
        if name in self._quantised:
            return dense(self._quantised[name][:])
        tensor: Tensor = self._shards[name][1].get_tensor(self._prefix + name)
        return tensor

    def stored(self, name: str) -> Stored:
        if name in self._quantised:
            return self._quantised[name]
        view: Stored = self._slice(name)
        return view

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in expected_tensors(self.arch):
            yield name, self.tensor(name)


def _text_tensors(shards: Shards, text: TextModel, folder: Path) -> Shards:
    """Those of the text model under their names there; tensors of other parts are left out."""
    skipped = [name for name in shards if name.startswith(text.skipped)]
    if skipped:
        logger.warning(
            "%s: %d tensors of %s are skipped: the model is served for text only",
            folder,
            len(skipped),
            ", ".join(sorted({name.partition(".")[0] for name in skipped})),
        )
    if not any(name.startswith(text.prefix) for name in shards):
        raise ValueError(f"{folder}: no tensor's name begins with {text.prefix!r}")
    return {
        name.removeprefix(text.prefix): place
        for name, place in shards.items()
        if not name.startswith(text.skipped)
    }


def _shard_paths(folder: Path) -> list[Path]:
    if (folder / INDEX_FILE).is_file():
        return _indexed_shards(folder)
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    candidates = sorted(folder.glob("*.safetensors"))
    if len(candidates) != 1:
        names = ", ".join(path.name for path in candidates) or "none"
        raise ValueError(
            f"{folder} needs {SINGLE_FILE}, or {INDEX_FILE} with its shards; "
            f"it holds these .safetensors files: {names}"
        )
    return candidates


def _indexed_shards(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index} names the shard {name!r}, which is not in {folder}")
    return [folder / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError naming the file if it holds something else, or more
    than MAX_JSON bytes."""
    try:
        content = json.loads(read_text(path, MAX_JSON))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content
