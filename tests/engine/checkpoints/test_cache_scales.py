"""Scales of keys and values in FP8 are found under every published name, and checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.source import ModelFiles
from kernels.ops import CacheScales
from tests.support.files.quantised_files import change_tensors
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama

LAYER = "model.layers.0.self_attn"


def scales(folder: Path, **tensors: Tensor) -> dict[int, CacheScales]:
    """Of a model with these tensors of its first layer."""
    write_tiny_llama(folder, TinyLlama(num_layers=2))
    change_tensors(folder, **{f"{LAYER}.{name}": each for name, each in tensors.items()})
    return open_checkpoint(ModelFiles("hf", folder, folder.name)).cache_scales()


@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale", "q_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
)
def test_every_name_is_read(tmp_path: Path, names: tuple[str, ...]) -> None:
    values = (torch.tensor([0.25]), torch.tensor(0.5), torch.tensor(0.125))
    found = scales(tmp_path, **dict(zip(names, values, strict=False)))
    assert found == {0: CacheScales(0.25, 0.5)}


def test_one_scale_may_be_for_both(tmp_path: Path) -> None:
    assert scales(tmp_path, kv_scale=torch.tensor(0.5)) == {0: CacheScales(0.5, 0.5)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"k_scale": torch.ones(1)}, "only one of keys and values: layer 0"),
        ({"k_scale": torch.ones(4), "v_scale": torch.ones(4)}, "k_scale holds .*one positive num"),
        ({"kv_scale": torch.zeros(1)}, "kv_scale holds .*0.0.*one positive number"),
    ],
)
def test_other_scales_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scales(tmp_path, **tensors)
