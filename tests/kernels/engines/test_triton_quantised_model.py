"""Models of quantised checkpoints over Triton kernels: weights stay quantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.source import ModelFiles
from engine.models.families import load_target
from engine.models.footprint import bytes_by_form, held_bytes
from engine.models.place import Place
from kernels.linear.scaled import FP8
from kernels.ops import ExpertWeights
from kernels.registry import build_ops
from tests.kernels import triton_env
from tests.support.files.quantised_files import (
    FORMATS,
    FP8_CHANNEL,
    FP8_WEIGHTS,
    Format,
    llama4_file,
    rewrite,
    separate_experts,
)
from tests.support.models.packed import CPU, PackedModel, whole
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.models.tiny_llama4 import write_tiny_llama4

triton_env.load("kernels.linear.triton_kernel")
pytestmark = [
    *triton_env.MARKS,
    pytest.mark.skipif(not triton_env.INTERPRETED, reason="the model is on the CPU"),
]
IDS = [5, 17, 200, 33]


def logits_and_model(folder: Path, cache: Path) -> tuple[torch.Tensor, object]:
    ops = build_ops("triton", CPU, torch.float32, 1, cache)
    checkpoint = open_checkpoint(ModelFiles("hf", folder, folder.name))
    model = load_target(checkpoint.arch, checkpoint.stored, Place(ops, torch.float32, CPU), 64)
    return PackedModel(model, ops, torch.float32).run(whole(0, IDS, [3]))[0], model


@pytest.mark.parametrize(
    ("form", "kept", "tolerance"),
    [
        (FORMATS["packed-zeros"], torch.uint8, 1e-4),
        (FORMATS["gptq"], torch.uint8, 1e-4),
        (FP8_WEIGHTS, FP8, 1e-4),
        (FP8_CHANNEL, FP8, 0.1),  # rounds activations
    ],
    ids=["packed-zeros", "gptq", "fp8-weights", "fp8"],
)
def test_a_llama_computes_with_its_quantised_weights(
    tmp_path: Path, form: Format, kept: torch.dtype, tolerance: float
) -> None:
    model = write_tiny_llama(tmp_path, TinyLlama(num_layers=1, hidden_size=128))
    rewrite(tmp_path, model, form)
    with torch.inference_mode():
        wanted = model(torch.tensor([IDS])).logits[0]
    got, loaded = logits_and_model(tmp_path, tmp_path)
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    layer, held = loaded.layers[0], bytes_by_form(loaded)  # type: ignore[attr-defined]
    assert layer.attention.qkv.weight.data.dtype == kept
    assert layer.mlp.down.weight.data.dtype == kept
    assert list(held) == ["float32", "fp8" if kept == FP8 else "q4"]
    assert sum(held.values()) == held_bytes(loaded)


@pytest.mark.parametrize(
    ("form", "kept"),
    [(FP8_WEIGHTS, FP8), (FORMATS["packed"], torch.uint8)],
    ids=["fp8", "four-bits"],
)
def test_a_llama4_computes_with_quantised_experts(
    tmp_path: Path, form: Format, kept: torch.dtype
) -> None:
    model = write_tiny_llama4(
        tmp_path, num_hidden_layers=1, interleave_moe_layer_step=1, intermediate_size=32
    )
    llama4_file(separate_experts(model, form), tmp_path, form)
    with torch.inference_mode():
        wanted = model(torch.tensor([IDS])).logits[0]
    got, loaded = logits_and_model(tmp_path, tmp_path)
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    experts: ExpertWeights = loaded.decoder.layers[0].feed_forward.experts  # type: ignore[attr-defined]
    assert experts.gate_up[0].data.dtype == kept
    assert experts.down[0].data.dtype == kept
