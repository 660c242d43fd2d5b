"""A Llama cut over ranks gives the same results as on one rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.checkpoints.arch import LlamaArch
from engine.kv.storage import KVStorage
from engine.models.llama import Llama, LlamaLoader
from engine.models.place import Place
from engine.parallel.shard import WHOLE, Shard
from engine.step.group import TPGroup
from kernels.ops import Ops
from kernels.registry import build_ops
from tests.support.engines.tiny_engine import random_llama
from tests.support.models.packed import PackedModel, whole
from tests.support.ranks.thread_group import run_ranks

CPU = torch.device("cpu")
NUM_BLOCKS = 8
TOLERANCE = 1e-4  # float32 sums in another order
VOCAB = 131  # prime
SHAPE = {"num_attention_heads": 12, "head_dim": 16, "intermediate_size": 144, "hidden_size": 72}


@dataclass(frozen=True)
class Case:
    size: int
    num_kv_heads: int
    more: dict[str, Any] = field(default_factory=dict)


BIASED = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
CASES = {
    "two ranks": Case(2, 4),
    "two ranks, tied, biases": Case(2, 12, TIED | BIASED),
    "three ranks, tied": Case(3, 3, TIED),
    "three ranks, biases": Case(3, 6, BIASED),
    "three ranks, one KV head on all": Case(3, 1),
    "four ranks": Case(4, 12),
    "four ranks, each KV head on two": Case(4, 2, TIED | BIASED),
    "four ranks, the last beyond the vocabulary": Case(4, 4, {"vocab_size": 9}),
}


def packed(model: Llama, ops: Ops, group: TPGroup, shard: Shard) -> PackedModel:
    """One rank's model with a KV cache full of NaN."""
    return PackedModel(model, ops, torch.float32, NUM_BLOCKS, group=group, shard=shard)


def run(ranked: PackedModel) -> list[Tensor]:
    """Logits [T, V] of chunks of two prompts in one batch, then of one more token of each."""
    vocab = ranked.model.arch.vocab_size
    one, two = ([at * step % vocab for at in range(1, 40)] for step in (7, 11))
    steps = [
        [whole(0, one[:20], [3, 5])],
        [whole(0, one[20:33], [3, 5, 0], start=20), whole(1, two[:38], [1, 6, 2])],
        [whole(1, two[38:], [1, 6, 2], start=38), whole(0, one[33:34], [3, 5, 0], start=33)],
    ]
    return [torch.cat(ranked.run(*rows)) for rows in steps]


def load(oracle: LlamaForCausalLM, ops: Ops, shard: Shard) -> Llama:
    arch = LlamaArch.from_hf_config(oracle.config.to_dict())
    read = oracle.state_dict().__getitem__
    return LlamaLoader(arch, read, Place(ops, torch.float32, CPU, shard), 64).load()


def heads_of(kv: KVStorage, heads: slice) -> list[Tensor]:
    return [pages[:NUM_BLOCKS, :, heads] for pages in (*kv.keys, *kv.values)]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_together_compute_what_one_computes(
    name: str, backend: Literal["reference", "auto"], native_cache: Path
) -> None:
    case = CASES[name]
    settings = SHAPE | {"vocab_size": VOCAB, "num_key_value_heads": case.num_kv_heads} | case.more
    oracle = random_llama(**settings)

    def ops() -> Ops:  # native operations of one table run one at a time
        return build_ops(backend, CPU, torch.float32, 1, native_cache)

    alone_ops = ops()
    alone = packed(load(oracle, alone_ops, WHOLE), alone_ops, TPGroup(), WHOLE)
    expected = run(alone)

    def work(group: TPGroup) -> tuple[list[Tensor], list[Tensor]]:
        shard, own = Shard(group.rank, group.size), ops()
        ranked = packed(load(oracle, own, shard), own, group, shard)
        return run(ranked), heads_of(ranked.context.kv, slice(None))

    for rank, (found, pages) in enumerate(run_ranks(case.size, work)):
        for logits, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(logits, wanted, atol=TOLERANCE, rtol=TOLERANCE)
        held = Shard(rank, case.size).kv_heads(case.num_kv_heads)
        close = {"atol": TOLERANCE, "rtol": TOLERANCE, "equal_nan": True}
        torch.testing.assert_close(pages, heads_of(alone.context.kv, held), **close)


def test_the_oracle_of_ranks_is_that_of_transformers(reference_ops: Ops) -> None:
    oracle = random_llama(**SHAPE, vocab_size=VOCAB, **BIASED, num_key_value_heads=4)
    ranked = packed(load(oracle, reference_ops, WHOLE), reference_ops, TPGroup(), WHOLE)
    with torch.inference_mode():
        wanted = oracle(torch.tensor([[at * 7 % VOCAB for at in range(1, 21)]])).logits[0]
    torch.testing.assert_close(run(ranked)[0], wanted, atol=TOLERANCE, rtol=TOLERANCE)
