"""Llama 4 checkpoints: strict configurations, and every tensor of the text model exactly once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints.checkpoint import open_checkpoint, read_arch
from engine.checkpoints.families import read_text_model
from engine.checkpoints.llama4_arch import AttentionTemperature, Llama4Arch
from engine.checkpoints.source import ModelFiles
from tests.support.files.published_llamas import LLAMA4_MAVERICK, LLAMA4_SCOUT
from tests.support.files.quantised_files import FORMATS, FP8, fused_experts, llama4_file
from tests.support.models.tiny_llama4 import llama4_config, write_tiny_llama4

TEXT = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}


def arch_of(config: dict[str, Any]) -> Llama4Arch:
    arch = read_text_model(config).arch
    assert isinstance(arch, Llama4Arch)
    return arch


def test_published_models_are_read_as_their_authors_describe_them() -> None:
    scout, maverick = arch_of(LLAMA4_SCOUT), arch_of(LLAMA4_MAVERICK)
    assert (scout.num_experts, len(scout.moe_layers), scout.qk_norm) == (16, 48, True)
    assert (maverick.num_experts, len(maverick.moe_layers), maverick.qk_norm) == (128, 24, False)
    assert min(maverick.moe_layers) == 1
    for arch in (scout, maverick):
        assert sorted(set(range(48)) - arch.rope_layers) == list(range(3, 48, 4))
        assert (arch.chunk_layers, arch.attention_chunk) == (arch.rope_layers, 8192)
        assert arch.temperature == AttentionTemperature(8192, 0.1)
    assert (scout.feed_forward_sizes, maverick.feed_forward_sizes) == ((8192,), (8192, 16384))


def test_absent_keys_take_the_defaults_of_transformers() -> None:
    config = llama4_config().to_dict()
    asked = {**TEXT, "vocab_size": 99, "hidden_size": 80}
    named = type(llama4_config())(**asked).to_dict()
    assert arch_of(asked) == arch_of(named)
    assert arch_of({**config, "attention_chunk_size": None}).attention_chunk is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 2}, "num_experts_per_tok 2 is not supported; 1 is"),
        ({"moe_layers": [4]}, r"moe_layers \[4\] are not among the layers 0 to 3"),
        ({"no_rope_layers": [1, 1]}, "a 0 or 1 for each of 4 layers"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, not 4"),
        ({"layer_types": ["sliding_attention"] * 4}, "not supported; full_attention, chunked_"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "exl2"}}, r"quant_method 'exl2'.*gptq are"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "default and llama3 are"),
        ({"architectures": ["Llama4VisionModel"]}, "Llama4VisionModel is not supported; Llama"),
        ({"architectures": ["Llama4ForConditionalGeneration"]}, "text_config is missing"),
    ],
)
def test_other_arithmetic_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_text_model({**llama4_config().to_dict(), **TEXT, **change})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama4")
    write_tiny_llama4(path)
    return path


def copied(folder: Path, to: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (to / "config.json").write_text(json.dumps({**old, **config}), encoding="utf-8")
    save_file(tensors, to / "model.safetensors")
    return to


def files(folder: Path) -> ModelFiles:
    return ModelFiles("hf", folder, "tiny")


def test_the_text_part_of_a_model_for_images_is_read(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = load_file(folder / "model.safetensors")
    tensors = {f"language_model.{name}": tensor for name, tensor in own.items()}
    tensors["vision_model.patch_embedding.weight"] = torch.zeros(3)
    tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(3)
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Llama4ForConditionalGeneration"],
                "model_type": "llama4",
                "text_config": text,
                "vision_config": {},
            }
        ),
        encoding="utf-8",
    )
    save_file(tensors, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(files(tmp_path))
    assert "2 tensors of multi_modal_projector, vision_model are skipped" in caplog.text
    plain = open_checkpoint(files(folder))
    assert checkpoint.arch == plain.arch == read_arch(str(tmp_path))
    assert checkpoint.eos_token_ids == plain.eos_token_ids
    for (name, tensor), (other, wanted) in zip(checkpoint.tensors(), plain.tensors(), strict=True):
        assert name == other
        assert torch.equal(tensor, wanted)


EXPERT = "model.layers.1.feed_forward.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({EXPERT: None}, f"missing tensor {EXPERT}"),
        ({EXPERT: torch.zeros(4, 96, 80)}, r"has shape \[4, 96, 80\].*asks for \[4, 80, 96\]"),
        ({"model.layers.0.feed_forward.router.weight": torch.zeros(4, 96)}, "unexpected tensor"),
        ({"model.layers.0.self_attn.qk_norm.weight": torch.zeros(64)}, "unexpected tensor"),
    ],
)
def test_wrong_tensors_are_errors_that_name_them(
    folder: Path, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        open_checkpoint(files(copied(folder, tmp_path, kept)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_local_experts": 8}, r"router.weight has shape \[4, 96\], .* asks for \[8, 96\]"),
        ({"num_local_experts": 0}, "num_local_experts must be at least 1, not 0"),
        (
            {"architectures": ["Llama4ForConditionalGeneration"], "vision_config": {}},
            "text_config is missing: a model for images only cannot be served",
        ),
        ({"architectures": ["Llama4VisionModel"]}, "Llama4VisionModel is not supported; Llama"),
        ({"quantization_config": {"quant_method": "exl2"}}, "'exl2'.* are not supported; compres"),
    ],
)
def test_a_configuration_of_another_model_is_an_error(
    folder: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    tensors = load_file(folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(files(copied(folder, tmp_path, tensors, **config)))


STACK = "model.layers.1.feed_forward.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{STACK}_scale": None}, f"tensor {STACK} of all experts needs {STACK}_scale"),
        ({f"{STACK}_scale": torch.ones(2, 1, 160)}, r"_scale has shape \[2, 1, 160\]; for experts"),
        (
            {STACK: torch.zeros(96, 160).to(FP8)},
            r"shape \[96, 160\]; that of all experts has three",
        ),
    ],
)
def test_experts_in_fp8_need_a_scale_for_each_output(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    form = FORMATS["fbgemm"]
    tensors = {**fused_experts(write_tiny_llama4(tmp_path), form), **change}
    llama4_file({k: each for k, each in tensors.items() if each is not None}, tmp_path, form)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(files(tmp_path))
