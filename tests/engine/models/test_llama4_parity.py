"""Compares our Llama 4 with transformers in float32, over several chunks of positions."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from transformers import Llama4ForCausalLM

from engine.checkpoints.families import read_text_model
from engine.models.families import load_target
from engine.models.place import Place
from kernels.ops import Ops
from tests.support.models.packed import CPU, PackedModel, whole
from tests.support.models.tiny_llama4 import random_llama4

SHAPES: dict[str, dict[str, object]] = {
    "every-second-moe": {},
    "all-moe-biased-tied": {
        "interleave_moe_layer_step": 1,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "listed-layers": {
        "no_rope_layers": [1, 0, 0, 1],
        "moe_layers": [0],
        "use_qk_norm": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "all-full-without-temperature": {
        "attention_chunk_size": None,
        "attn_temperature_tuning": False,
        "num_local_experts": 3,
    },
}


@pytest.fixture(params=SHAPES, scope="module")
def oracle(request: pytest.FixtureRequest) -> Llama4ForCausalLM:
    return random_llama4(**SHAPES[request.param])


@pytest.fixture(params=["reference", "native"])
def packed(request: pytest.FixtureRequest, oracle: Llama4ForCausalLM) -> PackedModel:
    ops: Ops = request.getfixturevalue(f"{request.param}_ops")
    arch = read_text_model(oracle.config.to_dict()).arch
    read = oracle.state_dict().__getitem__
    model = load_target(arch, read, Place(ops, torch.float32, CPU), 1024)
    return PackedModel(model, ops, torch.float32)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 131), k=length)


@torch.inference_mode()
def expected(oracle: Llama4ForCausalLM, token_ids: list[int]) -> torch.Tensor:
    return oracle(torch.tensor([token_ids])).logits[0]


def test_logits_of_a_mixed_batch_equal_transformers(
    oracle: Llama4ForCausalLM, packed: PackedModel
) -> None:
    ids = [prompt(length, seed=length) for length in (1, 24, 25, 130)]
    tables = ([3], [9, 5], [7, 8], [20, 2, 30, 4, 40, 6, 50, 10, 60])
    rows = [
        whole(line, tokens, table)
        for line, (tokens, table) in enumerate(zip(ids, tables, strict=True))
    ]
    for got, token_ids in zip(packed.run(*rows), ids, strict=True):
        torch.testing.assert_close(got, expected(oracle, token_ids), atol=2e-4, rtol=0)


def test_chunks_and_single_tokens_continue_from_the_cache(
    oracle: Llama4ForCausalLM, packed: PackedModel
) -> None:
    """Pieces end before, at and after the borders 24, 48 and 72."""
    ids, table = prompt(100), [7, 1, 12, 3, 9, 4, 2]
    ends = [0, 23, 24, 25, 48, 71, 72, 73, 100]
    pieces = []
    for start, end in itertools.pairwise(ends):
        pieces += packed.run(whole(0, ids[start:end], table[: (end + 15) // 16], start))
    torch.testing.assert_close(torch.cat(pieces), expected(oracle, ids), atol=2e-4, rtol=0)
