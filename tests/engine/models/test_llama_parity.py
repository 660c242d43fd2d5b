"""Compares our forward with transformers in float32, on tiny models of every supported shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.checkpoints.arch import LlamaArch
from kernels.ops import Ops
from tests.support.models.packed import PackedModel, load_packed, whole

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def config(heads: int, kv_heads: int, head_dim: int, **changes: object) -> LlamaConfig:
    settings: dict[str, object] = {
        "vocab_size": 131,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 1024,
        "rope_parameters": DEFAULT_ROPE,
        "rms_norm_eps": 1e-5,
    }
    return LlamaConfig(**(settings | changes))


SHAPES: dict[str, Callable[[], LlamaConfig]] = {
    "llama2-mha-d64": lambda: config(2, 2, 64),
    "llama31-gqa4-d128": lambda: config(4, 1, 128, rope_parameters=LLAMA3_ROPE),
    "llama32-gqa4-d64-tied": lambda: config(
        8, 2, 64, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True
    ),
    "gqa8-d64-biases": lambda: config(8, 1, 64, attention_bias=True, mlp_bias=True),
    "yarn-gqa2-d64": lambda: config(2, 1, 64, rope_parameters=YARN_ROPE),
    "gqa3-d64-tied": lambda: config(6, 2, 64, tie_word_embeddings=True),
}


@pytest.fixture(params=SHAPES, scope="module")
def oracle(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    torch.manual_seed(7)
    model = LlamaForCausalLM(SHAPES[request.param]()).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    return model


@pytest.fixture(params=["reference", "native"])
def packed(request: pytest.FixtureRequest, oracle: LlamaForCausalLM) -> PackedModel:
    ops: Ops = request.getfixturevalue(f"{request.param}_ops")
    arch = LlamaArch.from_hf_config(oracle.config.to_dict())
    return load_packed(arch, oracle.state_dict().__getitem__, ops, torch.float32)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 131, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def expected(oracle: LlamaForCausalLM, token_ids: list[int]) -> torch.Tensor:
    return oracle(torch.tensor([token_ids])).logits[0]


def test_logits_of_a_mixed_batch_equal_transformers(
    oracle: LlamaForCausalLM, packed: PackedModel
) -> None:
    ids = prompts(1, 17, 130)
    blocks = ([3], [9, 5], [20, 2, 30, 4, 40, 6, 50, 8, 60])
    rows = [
        whole(line, tokens, table)
        for line, (tokens, table) in enumerate(zip(ids, blocks, strict=True))
    ]
    for got, token_ids in zip(packed.run(*rows), ids, strict=True):
        torch.testing.assert_close(got, expected(oracle, token_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_logits_beyond_the_original_context_equal_transformers(kind: str, native_ops: Ops) -> None:
    (ids,) = prompts(130)
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    torch.manual_seed(7)
    model = LlamaForCausalLM(config(2, 1, 64, rope_parameters=rope, max_position_embeddings=64))
    arch = LlamaArch.from_hf_config(model.config.to_dict())
    read = model.state_dict().__getitem__
    served = load_packed(arch, read, native_ops, torch.float32, max_len=len(ids))
    (got,) = served.run(whole(0, ids, list(range(9))))
    torch.testing.assert_close(got, expected(model.eval(), ids), atol=1e-4, rtol=0)


def test_chunks_and_single_tokens_continue_from_the_cache(
    oracle: LlamaForCausalLM, packed: PackedModel
) -> None:
    (ids,) = prompts(75)
    table = [7, 1, 12, 3, 9]
    pieces = []
    for start, end in ((0, 30), (30, 31), (31, 64), (64, 75)):
        pieces += packed.run(whole(0, ids[start:end], table[: (end + 15) // 16], start))
    torch.testing.assert_close(torch.cat(pieces), expected(oracle, ids), atol=1e-4, rtol=0)
