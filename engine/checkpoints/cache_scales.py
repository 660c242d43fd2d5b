"""Scales that a checkpoint has for a cache of keys and values in FP8."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from engine.checkpoints.manifest import listed
from engine.checkpoints.stored import View
from kernels.ops import CacheScales

# As compressed-tensors, ModelOpt and their predecessors name them
NAME = re.compile(
    r"layers\.(?P<layer>\d+)\.self_attn\."
    r"(?:(?:attn\.)?(?P<of>[qkv])_scale|(?P<from>[qkv])_proj\.(?:[qkv]_scale|output_scale)"
    r"|(?P<both>kv)_scale)$"
)


def scale_names(names: Iterable[str]) -> list[str]:
    """Those of scales, sorted."""
    return sorted(name for name in names if NAME.search(name))


def read_cache_scales(views: Mapping[str, View]) -> dict[int, CacheScales]:
    """By layer, from tensors of `scale_names`. Scales of queries are not used.

    Raises:
        ValueError: a scale is not one positive number, or a layer has only one of two.
    """
    found: dict[int, dict[str, float]] = {}
    for name, view in views.items():
        match = NAME.search(name)
        assert match is not None
        kind = match["of"] or match["from"] or match["both"]
        if kind != "q":
            found.setdefault(int(match["layer"]), {}).update(
                dict.fromkeys(kind, _scale(name, view))
            )
    halves = [f"layer {layer}" for layer, scales in found.items() if scales.keys() != {"k", "v"}]
    if halves:
        raise ValueError(f"scales for only one of keys and values: {listed(halves)}")
    return {layer: CacheScales(scales["k"], scales["v"]) for layer, scales in found.items()}


def _scale(name: str, view: View) -> float:
    values = torch.as_tensor(view[...]).float().flatten()
    if len(values) != 1 or not 0 < values.item() < float("inf"):
        raise ValueError(
            f"tensor {name} holds {values.tolist()[:4]}; a scale of keys or values is one positive "
            "number for all heads of a layer"
        )
    return values.item()
