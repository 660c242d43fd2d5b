"""Rotary tables of every kind of scaling are those of transformers in float32."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.rope_scaling import json_positions, rope_json
from engine.models.rope import cos_sin_table

ORIGINAL, LONG = 64, 200  # positions
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": YARN | LLAMA3 | {"rope_type": "llama3"},
    "yarn": YARN,
    "yarn-attention-factor": YARN | {"attention_factor": 0.8},
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-betas": YARN | {"beta_fast": 6.0, "beta_slow": 2.0},
    "yarn-not-truncated": YARN | {"beta_fast": 6.0, "truncate": False},
}


def config_of(rope: dict[str, Any], theta: float = 10000.0) -> LlamaConfig:
    extended = rope["rope_type"] in ("yarn", "llama3")
    return LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=256 if extended else ORIGINAL,
        rope_parameters=rope | {"rope_theta": theta},
        architectures=["LlamaForCausalLM"],
    )


def oracle(config: LlamaConfig, length: int) -> torch.Tensor:
    """[length, D] cosines of all frequencies, then sines, for a sequence of this length."""
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    return torch.cat((cos[0].chunk(2, dim=-1)[0], sin[0].chunk(2, dim=-1)[0]), dim=-1)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("length", [ORIGINAL - 1, LONG])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_equal_those_of_transformers(kind: str, length: int, theta: float) -> None:
    config = config_of(KINDS[kind], theta)
    arch = LlamaArch.from_hf_config(config.to_dict())
    table = cos_sin_table(arch.head_dim, length, arch.rope_theta, arch.rope_scaling)
    torch.testing.assert_close(table, oracle(config, length), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "positions"), [("default", 64), ("linear", 256), ("dynamic", 256), ("yarn", 256)]
)
def test_stretched_contexts_are_served(kind: str, positions: int) -> None:
    arch = LlamaArch.from_hf_config(config_of(KINDS[kind]).to_dict())
    assert arch.max_position_embeddings == positions


@pytest.mark.parametrize("kind", KINDS)
def test_scalings_are_written_as_they_are_read(kind: str) -> None:
    content = config_of(KINDS[kind]).to_dict()
    arch = LlamaArch.from_hf_config(content)
    written = {
        "rope_parameters": None,
        "rope_theta": arch.rope_theta,
        "rope_scaling": rope_json(arch.rope_scaling),
        "max_position_embeddings": json_positions(arch.rope_scaling, arch.max_position_embeddings),
    }
    assert LlamaArch.from_hf_config(content | written) == arch
    # records of training runs hold architectures
    assert msgspec.json.decode(msgspec.json.encode(arch), type=LlamaArch) == arch


def test_the_original_context_of_yarn_may_stand_outside_of_its_table() -> None:
    inside = config_of(KINDS["yarn"]).to_dict()
    rope = {"type": "yarn", "factor": None, "finetuned": True}
    outside = inside | {"rope_parameters": rope, "original_max_position_embeddings": ORIGINAL}
    assert (
        LlamaArch.from_hf_config(outside).rope_scaling
        == LlamaArch.from_hf_config(inside).rope_scaling
    )
