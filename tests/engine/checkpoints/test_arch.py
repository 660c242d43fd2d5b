"""Configurations are read strictly: unsupported arithmetic is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from engine.checkpoints.arch import Llama3RopeScaling, LlamaArch, bos_token_id, eos_token_ids

MINIMAL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALING = Llama3RopeScaling(32.0, 1.0, 4.0, 8192)


def test_absent_keys_take_the_defaults_of_transformers() -> None:
    arch = LlamaArch.from_hf_config(MINIMAL)
    reference = LlamaConfig(**MINIMAL)
    assert arch.num_kv_heads == reference.num_key_value_heads == 4
    assert arch.head_dim == reference.head_dim == 16
    assert arch.rms_norm_eps == reference.rms_norm_eps
    assert arch.rope_theta == reference.rope_parameters["rope_theta"]
    assert arch.max_position_embeddings == reference.max_position_embeddings
    assert arch.tie_word_embeddings == reference.tie_word_embeddings
    assert arch == LlamaArch.from_hf_config(reference.to_dict())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
    ],
)
def test_both_layouts_of_llama3_rope_are_read(rope: dict[str, Any]) -> None:
    arch = LlamaArch.from_hf_config(MINIMAL | rope)
    assert (arch.rope_theta, arch.rope_scaling) == (500000.0, SCALING)


@pytest.mark.parametrize(
    "rope", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}]
)
def test_plain_rope_has_no_scaling(rope: dict[str, Any]) -> None:
    assert LlamaArch.from_hf_config(MINIMAL | {"rope_theta": 1e6} | rope).rope_theta == 1e6
    assert LlamaArch.from_hf_config(MINIMAL | rope).rope_scaling is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM.*LlamaForCausalLM"),
        ({"architectures": None, "model_type": "qwen2"}, "qwen2"),
        ({"architectures": []}, "not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "64"}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 0}, "at least 1, not 0"),
        ({"num_attention_heads": 0}, "at least 1, not 0"),
        ({"num_key_value_heads": 3}, "3 must divide num_heads 4"),
        ({"head_dim": 15}, "head_dim 15 must be even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
    ],
)
def test_unsupported_configurations_are_refused_by_name(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaArch.from_hf_config(MINIMAL | change)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 2]}, (7, 2)),
        ({"eos_token_id": 0}, {"eos_token_id": 7}, (7, 0)),
        ({"eos_token_id": [3, 4]}, {}, (3, 4)),
        ({}, None, ()),
    ],
)
def test_eos_ids_are_those_of_both_configurations(
    config: dict[str, Any], generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    assert eos_token_ids(config, generation) == expected


def test_eos_and_bos_that_are_no_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="eos_token_id"):
        eos_token_ids({"eos_token_id": "</s>"})
    with pytest.raises(ValueError, match="bos_token_id"):
        bos_token_id({"bos_token_id": [1]})
