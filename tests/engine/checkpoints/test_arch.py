"""Configurations are read strictly: unsupported arithmetic is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from engine.checkpoints.arch import LlamaArch, bos_token_id, eos_token_ids
from engine.checkpoints.rope_scaling import Llama3RopeScaling

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
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "at least 1, not 0.5"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not supported; default"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "have mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "have full_attention"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "2"}}, "factor must be a number"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": 0.5}}, "beta_fast >="),
        (
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "factor": 2.0,
                    "original_max_position_embeddings": 7,
                }
            },
            "starts from max_position_embeddings 2048",
        ),
        ({"sliding_window": 128}, "sliding_window 128 is not supported; null is"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*sliding"),
        ({"logits_scaling": 8.0}, "logits_scaling 8.0 is not supported; null, 1 is"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
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


def test_keys_of_other_architectures_are_allowed_where_they_change_nothing() -> None:
    neutral = {
        "hidden_act": "swish",
        "sliding_window": 2048,
        "layer_types": ["full_attention"] * 2,
        "logit_scale": 1.0,
        "use_qk_norm": False,
        "pretraining_tp": 2,
    }
    assert LlamaArch.from_hf_config(MINIMAL | neutral) == LlamaArch.from_hf_config(MINIMAL)
    window = {"sliding_window": 128, "use_sliding_window": False}
    assert LlamaArch.from_hf_config(MINIMAL | window) == LlamaArch.from_hf_config(MINIMAL)


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
