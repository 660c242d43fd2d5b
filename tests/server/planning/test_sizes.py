"""Sizes and formats are read from config.json alone."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from configs.planning import shipped_models
from server.planning.formats import BF16, FP8
from server.planning.products import layer_products, vocabulary
from server.planning.sizes import ModelSizes
from tests.support.files.quantised_files import AWQ_CONFIG, GPTQ_CONFIG, float8, fp8_blocks, int4

DENSE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def shipped(name: str) -> ModelSizes:
    return ModelSizes.from_config(json.loads(shipped_models()[name].read_text(encoding="utf-8")))


def billions(sizes: ModelSizes) -> tuple[float, float]:
    """Parameters of matrices: all, and those that a token uses (of the embedding: none)."""
    products = [*layer_products(sizes, 1), vocabulary(sizes, 1)]
    each = [(p.count * p.inputs * p.outputs, p) for p in products]
    table = sizes.vocab_size * sizes.hidden_size
    return (
        (sum(size * p.copies for size, p in each) + table) / 1e9,
        (sum(size * p.used for size, p in each) + table) / 1e9,
    )


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03, 8.03),
        ("meta-llama/Llama-3.3-70B-Instruct", 70.6, 70.6),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", 109, 17),
        ("meta-llama/Llama-4-Maverick-17B-128E-Instruct", 400, 17),
    ],
)
def test_shipped_sizes_add_up_to_the_published_parameters(
    name: str, total: float, active: float
) -> None:
    """Llama 4's published totals include a vision encoder."""
    assert billions(shipped(name)) == (
        pytest.approx(total, rel=0.02),
        pytest.approx(active, rel=0.03),
    )


def test_maverick_has_experts_in_every_second_layer_and_only_they_are_fp8() -> None:
    sizes = shipped("meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8")
    assert sizes.experts is not None
    assert (sizes.experts.num_layers, sizes.num_dense_layers, sizes.local_layers) == (24, 24, 36)
    kept = sizes.formats
    assert (kept.experts, kept.attention, kept.shared, kept.dense) == (FP8, BF16, BF16, BF16)


@pytest.mark.parametrize(
    ("quantised", "name"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}},
            },
            "int8",
        ),
    ],
)
def test_quantised_layers_are_counted_so(quantised: dict[str, Any], name: str) -> None:
    kept = ModelSizes.from_config(DENSE | {"quantization_config": quantised}).formats
    assert (kept.attention.name, kept.dense.name, kept.vocabulary) == (name, name, BF16)


@pytest.mark.parametrize(
    ("quantised", "per_weight"),
    [
        (float8("channel"), 1.0),
        (fp8_blocks(), 1 + 4 / 128),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, 1 + 4 / 64),
        (int4(group_size=128), 0.5 + 2 / 128),
        (int4(group_size=32, symmetric=False), 0.5 + 8 / 32),
        (AWQ_CONFIG, 0.5 + 8 / 32),
        (GPTQ_CONFIG | {"sym": True, "group_size": 64}, 0.5 + 2 / 64),
        (GPTQ_CONFIG | {"desc_act": True}, 2.0),  # plain when loaded
        (int4(group_size=32, actorder="group"), 2.0),
    ],
)
def test_scales_count(quantised: dict[str, Any], per_weight: float) -> None:
    kept = ModelSizes.from_config(DENSE | {"quantization_config": quantised}).formats
    assert kept.dense.bytes_per_weight == per_weight
    assert kept.dense.bytes_per_output == (4 if per_weight == 1.0 else 0)


@pytest.mark.parametrize("pattern", ["re:.*self_attn.*", "model.layers.1.self_attn.q_proj"])
def test_modules_that_are_left_out_stay_plain(pattern: str) -> None:
    quantised = {"quant_method": "fp8", "modules_to_not_convert": [pattern]}
    kept = ModelSizes.from_config(DENSE | {"quantization_config": quantised}).formats
    assert (kept.attention, kept.dense) == (BF16, FP8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architecture \['GPT2LMHeadModel'\] cannot .*Ll"),
        ({"hidden_size": None}, "the model configuration lacks 'hidden_size'"),
        ({"vocab_size": "many"}, "vocab_size must be an integer, not 'many'"),
        ({"quantization_config": {"quant_method": "exl2"}}, "quant_method 'exl2' is not known; kn"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 3}},
            r"gptq weights of 3 bits \(int\) are not known; known: 8",
        ),
        ({"quantization_config": ["fp8"]}, r"quantization_config must be a table, not \['fp8'\]"),
        ({"text_config": 7}, "text_config must be a table, not 7"),
    ],
)
def test_what_cannot_be_planned_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSizes.from_config(DENSE | change)


def test_numbers_of_ranks_that_do_not_divide_name_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"parallel.tensor = 3: 64 attention heads .* 1, 2, 4, 8"):
        shipped("meta-llama/Llama-3.3-70B-Instruct").check_ranks(3)
    with pytest.raises(ValueError, match=r"parallel.tensor = 3: 40 attention .* allows 1, 2, 4, 8"):
        shipped("meta-llama/Llama-4-Scout-17B-16E-Instruct").check_ranks(3)


def test_whole_experts_need_experts_in_equal_numbers() -> None:
    with pytest.raises(ValueError, match=r"parallel.experts = expert: this model has no experts"):
        shipped("meta-llama/Llama-3.1-8B-Instruct").with_experts("expert")
    scout = shipped("meta-llama/Llama-4-Scout-17B-16E-Instruct").with_experts("expert")
    scout.check_ranks(8)
    assert scout.experts is not None
    odd = replace(scout, experts=replace(scout.experts, num_experts=12))
    with pytest.raises(ValueError, match=r"12 experts do not divide by 8 ranks; tensor is possib"):
        odd.check_ranks(8)
