"""Loads a model of any known architecture."""

from __future__ import annotations

from collections.abc import Mapping

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.llama4_arch import Llama4Arch
from engine.checkpoints.stored import ReadStored
from engine.models.interface import LoadedModel
from engine.models.llama import LlamaLoader
from engine.models.llama4 import Llama4Loader
from engine.models.place import Place
from kernels.ops import CacheScales


def load_target(
    arch: LlamaArch,
    read: ReadStored,
    place: Place,
    max_len: int,
    cache_scales: Mapping[int, CacheScales] | None = None,
) -> LoadedModel:
    """A rank's part of a target from tensors by Hugging Face name, for up to `max_len` positions.
    `cache_scales`: of its layers, if `place.cache_dtype` is FP8; those that are missing are 1.
    ValueError if it cannot be cut into `place.shard.size` parts."""
    if isinstance(arch, Llama4Arch):
        return Llama4Loader(arch, read, place, max_len, cache_scales).load()
    return LlamaLoader(arch, read, place, max_len, cache_scales).load()
