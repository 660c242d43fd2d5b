"""The config.json of draft heads, in the layouts that other engines read."""

from __future__ import annotations

from typing import Any

from drafter.heads.config import AUX_IDS, HeadConfig
from engine.checkpoints.arch import ARCHITECTURE, LlamaArch
from engine.checkpoints.rope_scaling import json_positions, rope_json
from engine.step.taps import LAST_OUTPUT

EAGLE3_ARCHITECTURE = "LlamaForCausalLMEagle3"
NORMS = ("norm_before_fc", "fc_norm", "norm_output")  # written only where they are there


def eagle3_json(config: HeadConfig, target: LlamaArch) -> dict[str, Any]:
    """For the reference, vLLM and SGLang; P-EAGLE heads for vLLM. `HeadConfig.from_json` reads it
    back. ValueError for a head of another kind, or one that reads layers which `target` does not
    have."""
    if not config.like_eagle3:
        raise ValueError(f"a head of kind {config.kind!r} cannot be written as 'eagle3'")
    places = config.tap_layers(target) if config.use_aux else ()
    inputs = [target.num_layers if place == LAST_OUTPUT else place for place in places]
    return {
        "architectures": [EAGLE3_ARCHITECTURE],
        "model_type": "llama",
        **layers_json(config.arch),
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "norm_before_residual": config.norm_before_residual,
        # The same tensors twice: as inputs and as outputs of layers.
        AUX_IDS: inputs,
        "eagle_config": {
            AUX_IDS: [layer - 1 for layer in inputs],
            "use_aux_hidden_state": config.use_aux,
        },
        **{name: True for name in NORMS if getattr(config, name)},
        **({} if config.mask_token_id is None else {"ptd_token_id": config.mask_token_id}),
    }


def eagle_json(config: HeadConfig, target: LlamaArch) -> dict[str, Any]:
    """For the reference and vLLM, which call EAGLE heads Llamas; `HeadConfig.from_json` reads it
    back. ValueError for a head of another kind, or with parts that this kind lacks."""
    if config.kind != "eagle":
        raise ValueError(f"a head of kind {config.kind!r} cannot be written as 'eagle'")
    for name, own, only in (
        ("hidden_size", config.arch.hidden_size, target.hidden_size),
        ("draft_vocab_size", config.draft_vocab_size, target.vocab_size),
    ):
        if own != only:
            raise ValueError(f"an 'eagle' head has the target's {name} {only}, not {own}")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        **layers_json(config.arch),
        "bias": bool(config.fc_bias),  # of `fc`
    }


def layers_json(arch: LlamaArch) -> dict[str, Any]:
    """What describes decoder layers."""
    return {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": arch.rms_norm_eps,
        "rope_theta": arch.rope_theta,
        "rope_scaling": rope_json(arch.rope_scaling),
        "max_position_embeddings": json_positions(arch.rope_scaling, arch.max_position_embeddings),
        "attention_bias": arch.attention_bias,
        "mlp_bias": arch.mlp_bias,
        "tie_word_embeddings": False,
    }
