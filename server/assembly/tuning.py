"""Decides how attention shares keys between programs: as configured, or as is fastest here."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from engine.checkpoints.arch import LlamaArch
from engine.models.place import Place
from kernels.registry import ATTENTION_DEFAULT, with_attention

if TYPE_CHECKING:
    from kernels.attention.triton_choice import Heads

logger = logging.getLogger(__name__)


def with_tuning(place: Place, arch: LlamaArch, wanted: str) -> Place:
    """The place with the `wanted` tuning of attention; "auto": the fastest for one row on a CUDA
    device, measured now. Other devices than those with Triton kernels have none.

    Raises:
        ValueError: a tuning was asked for by name, but the kernels have none.
    """
    backend = place.ops.backends["attention"].name
    if backend != "triton":
        if wanted != "auto":
            raise ValueError(
                f"kernels.attention = {wanted} is for Triton kernels, and attention here is "
                f"{backend}; only auto is possible"
            )
        return place
    name = wanted if wanted != "auto" else _fastest(place, arch)
    return replace(place, ops=with_attention(place.ops, name))


def _fastest(place: Place, arch: LlamaArch) -> str:
    if place.device.type != "cuda":
        return ATTENTION_DEFAULT
    from kernels.attention.triton_choice import Heads  # Triton may be missing

    heads = Heads(
        arch.num_heads // place.shard.size,
        place.shard.num_kv_heads(arch.num_kv_heads),
        arch.head_dim,
        place.ops.activation_dtype,
        place.cache_dtype,
    )
    try:
        return _measured(heads, place.device)
    except torch.OutOfMemoryError:
        logger.warning("attention: no memory to measure in; %s is used", ATTENTION_DEFAULT)
        return ATTENTION_DEFAULT
    finally:
        torch.cuda.empty_cache()


@functools.cache  # times vary, but all engines of a process should add in the same order
def _measured(heads: Heads, device: torch.device) -> str:
    from kernels.attention.triton_choice import choose_tuning

    return choose_tuning(heads, device).name
