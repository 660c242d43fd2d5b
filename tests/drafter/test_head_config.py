"""config.json of draft heads: every layout is read, and invalid values are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from configs.schema import AuxLayers
from drafter.heads.config import HeadConfig
from drafter.heads.published import eagle3_json
from drafter.heads.untrained import eagle3_config
from engine.checkpoints.rope_scaling import Llama3RopeScaling
from engine.step.taps import LAST_OUTPUT
from tests.drafter.published_heads import (
    DRAFT_VOCAB,
    HEAD_DIM,
    HIDDEN,
    LAYOUTS,
    ROPE_SCALING,
    TARGET,
    named,
    speculators,
)

AUX = "eagle_aux_hidden_state_layer_ids"
EAGLE = named("LlamaForCausalLM")
EAGLE3 = named("LlamaForCausalLMEagle3", draft_vocab_size=DRAFT_VOCAB)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read(name: str) -> None:
    layout = LAYOUTS[name]
    config = HeadConfig.from_json(layout.config)
    assert config.kind == ("eagle3" if layout.kind == "eagle3" else "eagle")
    assert (config.arch.num_layers, config.arch.head_dim) == (layout.num_layers, HEAD_DIM)
    assert (config.arch.hidden_size, config.target_hidden_size) == (layout.hidden, HIDDEN)
    assert config.draft_vocab_size == layout.draft_vocab
    assert config.norm_before_residual == layout.norm_before_residual
    expected = layout.taps if layout.kind == "eagle3" else (TARGET.num_layers,)
    assert config.tap_layers(TARGET) == expected


def test_rotary_base_is_the_file_s_own_and_10000_without_one() -> None:
    assert HeadConfig.from_json(EAGLE3).arch.rope_theta == 10000.0
    assert HeadConfig.from_json(EAGLE3 | {"rope_theta": 5e5}).arch.rope_theta == 5e5
    scaled = HeadConfig.from_json(EAGLE3 | {"rope_scaling": ROPE_SCALING}).arch
    assert scaled.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"bias": True}, True),
        ({"bias": False}, False),
        ({"eagle_fc_bias": True}, True),
        ({"fusion_bias": False}, False),
    ],
)
def test_bias_of_fc_is_what_the_keys_say(keys: dict[str, Any], expected: bool | None) -> None:
    assert HeadConfig.from_json(EAGLE | keys).fc_bias is expected


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(8, (2, 4, 5)), (32, (2, 16, 29)), (80, (2, 40, 77))]
)
def test_taps_of_eagle3_default_to_low_middle_and_high(
    num_layers: int, expected: tuple[int, ...]
) -> None:
    target = dataclasses.replace(TARGET, num_layers=num_layers)
    assert HeadConfig.from_json(EAGLE3).tap_layers(target) == expected


def test_the_output_of_the_last_layer_is_a_place_of_its_own() -> None:
    for keys in ({AUX: [1, 8]}, {"eagle_config": {AUX: [0, 7]}}):
        config = HeadConfig.from_json(EAGLE3 | keys)
        assert config.tap_layers(TARGET) == (1, LAST_OUTPUT)
        assert HeadConfig.from_json(eagle3_json(config, TARGET)) == config


def test_outputs_named_by_nvidia_are_inputs_of_the_next_layers() -> None:
    config = HeadConfig.from_json(EAGLE3 | {"eagle_config": {AUX: [1, 23, 44]}})
    target = dataclasses.replace(TARGET, num_layers=48)
    assert config.tap_layers(target) == (2, 24, 45)
    assert config.feature_size == 3 * HIDDEN


@pytest.mark.parametrize("keys", [{AUX: [1, 4]}, {"eagle_config": {AUX: [1, 4]}}])
def test_the_operator_may_say_what_ids_of_layers_mean(keys: dict[str, Any]) -> None:
    taps = {
        aux: HeadConfig.from_json(EAGLE3 | keys, aux).tap_layers(TARGET)
        for aux in ("boundaries", "outputs", (0, 8))
    }
    assert taps == {"boundaries": (1, 4), "outputs": (2, 5), (0, 8): (0, LAST_OUTPUT)}


@pytest.mark.parametrize(
    ("config", "aux", "message"),
    [
        (EAGLE, "outputs", "'outputs', but an EAGLE head reads the final hidden state only"),
        (EAGLE3, "boundaries", "names no layers .*'auto' and a list are possible"),
        (
            EAGLE3 | {"use_aux_hidden_state": False},
            (1, 2),
            r"\[1, 2\], but this head reads the fin",
        ),
        (EAGLE3 | {"num_aux_hidden_states": 3}, (1, 2), "is 3, but .* names 2"),
    ],
)
def test_layers_that_a_head_cannot_read_are_refused(
    config: dict[str, Any], aux: AuxLayers, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig.from_json(config, aux)


def test_an_absent_norm_before_residual_means_what_it_does_in_vllm() -> None:
    keys = speculators("eagle3")
    keys.pop("norm_before_residual", None)
    assert HeadConfig.from_json(keys).norm_before_residual
    assert not HeadConfig.from_json(keys | {"norm_before_residual": False}).norm_before_residual
    assert not HeadConfig.from_json(EAGLE3).norm_before_residual


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (named("Qwen2ForCausalLM"), "draft head .'Qwen2ForCausalLM'. is not supported"),
        (named("EagleLlama4ForCausalLM"), "'EagleLlama4ForCausalLM'. is not supported"),
        (EAGLE | {"architectures": None}, "draft head llama is not supported"),
        (speculators("mlp_speculator"), "draft head mlp_speculator is not supported"),
        (speculators("eagle", layernorms=True), "layernorms True is not supported; False is"),
        (speculators("eagle3", transformer_layer_config=None), "transformer_layer_config is miss"),
        (speculators("eagle3", transformer_layer_config=1), "transformer_layer_config must be"),
        (EAGLE3 | {"model_type": "qwen3"}, "model_type 'qwen3' is not supported"),
        (EAGLE3 | {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (EAGLE3 | {"quantization_config": {"quant_method": "fp8"}}, "heads of quantised weights"),
        (EAGLE3 | {"use_qk_norm": True}, "use_qk_norm True is not supported"),
        (EAGLE3 | {"eagle_config": {"parallel_draft_step": 2}}, "parallel_draft_step 2 is not"),
        (EAGLE3 | {"norm_output": "yes"}, "norm_output must be bool, not 'yes'"),
        (
            EAGLE3
            | {"eagle_config": {"use_aux_hidden_state": False}, "target_hidden_size": HIDDEN + 1},
            "use_aux_hidden_state false needs a hidden_size 72",
        ),
        (
            EAGLE3 | {"num_aux_hidden_states": 4},
            f"num_aux_hidden_states is 4, but {AUX} names none",
        ),
        (EAGLE3 | {"num_aux_hidden_states": 3, AUX: [1, 2]}, "is 3, but .* names 2"),
        (
            EAGLE | {"model_type": "eagle", "truncated_vocab_size": 100},
            "truncated_vocab_size 100 is not supported; vocab_size 131 is",
        ),
        (EAGLE3 | {"rope_scaling": {"rope_type": "su"}}, "rope type 'su'"),
        (EAGLE3 | {"draft_vocab_size": 132}, "draft_vocab_size 132 must be 1 to vocab_size 131"),
        (EAGLE3 | {"draft_vocab_size": "37"}, "draft_vocab_size must be int, not '37'"),
        (EAGLE3 | {"norm_before_residual": 1}, "norm_before_residual must be bool, not 1"),
        (EAGLE3 | {"target_hidden_size": 0}, "target_hidden_size must be at least 1"),
        (EAGLE3 | {AUX: "2"}, f"{AUX} must be a list of layer numbers, not '2'"),
        (EAGLE3 | {AUX: [2, True]}, "must be a list of layer numbers"),
        (EAGLE3 | {AUX: [1, 2], "eagle_config": {AUX: [1, 2]}}, "must name the same tensors"),
        (EAGLE3 | {"eagle_config": [1]}, "eagle_config must be a table"),
        (EAGLE | {"bias": "yes"}, "bias must be bool, not 'yes'"),
        (EAGLE | {"hidden_size": None}, "hidden_size"),
    ],
)
def test_unusable_configuration_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig.from_json(config)


@pytest.mark.parametrize("layers", [[9], [-1], [2, 9, 4]])
def test_taps_outside_the_target_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="this target has layers 0 to 7"):
        HeadConfig.from_json(EAGLE3 | {AUX: layers}).tap_layers(TARGET)


def test_default_taps_need_a_target_of_three_layers() -> None:
    with pytest.raises(ValueError, match="this target has layers 0 to 1"):
        HeadConfig.from_json(EAGLE3).tap_layers(dataclasses.replace(TARGET, num_layers=2))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if LAYOUTS[name].kind == "eagle3"])
def test_written_configuration_is_read_back(name: str) -> None:
    config = HeadConfig.from_json(LAYOUTS[name].config)
    again = HeadConfig.from_json(eagle3_json(config, TARGET))
    assert again.tap_layers(TARGET) == config.tap_layers(TARGET)
    assert dataclasses.replace(again, aux_layers=None) == dataclasses.replace(
        config, aux_layers=None
    )


def test_written_configuration_keeps_rotary_scaling() -> None:
    scaled = dataclasses.replace(TARGET, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 64))
    config = eagle3_config(scaled, DRAFT_VOCAB)
    assert HeadConfig.from_json(eagle3_json(config, scaled)).arch == config.arch


def test_only_eagle3_is_written() -> None:
    with pytest.raises(ValueError, match="kind 'eagle' cannot be written"):
        eagle3_json(HeadConfig.from_json(EAGLE), TARGET)
