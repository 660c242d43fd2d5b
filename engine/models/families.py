"""Loads a model of any known architecture."""

from __future__ import annotations

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.llama4_arch import Llama4Arch
from engine.checkpoints.stored import ReadStored
from engine.models.interface import LoadedModel
from engine.models.llama import LlamaLoader
from engine.models.llama4 import Llama4Loader
from engine.models.place import Place


def load_target(arch: LlamaArch, read: ReadStored, place: Place, max_len: int) -> LoadedModel:
    """A rank's part of a target from tensors by Hugging Face name, for up to `max_len` positions.
    ValueError if it cannot be cut into `place.shard.size` parts."""
    if isinstance(arch, Llama4Arch):
        return Llama4Loader(arch, read, place, max_len).load()
    return LlamaLoader(arch, read, place, max_len).load()
