"""What FP8 costs where experts are kept in it: the bundled model as a Llama 4.

Half of each feed-forward becomes the shared expert, the other half every one of four experts, and
the router's scores are 1. So the model computes what the dense one does, and routes every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.accuracy import TEXT, WINDOW, cut, measures, scores
from configs.load import load_config
from drafter.train.data.target import FrozenTarget
from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.llama4_arch import Llama4Arch
from engine.checkpoints.source import BUNDLED_ALIAS, resolve_source
from engine.models.families import load_target
from engine.models.place import Place
from kernels.ops import Ops
from server.text.chat_codec import load_codec
from tests.support.configurations import hosted
from tests.support.quantised_files import FP8_CHANNEL
from tests.support.threads import own_torch_threads

pytestmark = pytest.mark.extended
EXPERTS, NUM_WINDOWS, DTYPE = 4, 2, torch.float32
Change = Callable[[Tensor], Tensor]
CHECKPOINT = open_checkpoint(resolve_source(BUNDLED_ALIAS))


@pytest.fixture(scope="module")
def windows(native_cache: Path) -> Iterator[list[list[int]]]:
    codec = load_codec(hosted(load_config(None, [f"files.dir={native_cache}"])))
    ids = codec.tokenizer.encode(TEXT.read_text(encoding="utf-8"), False)
    with own_torch_threads():
        yield cut(ids, WINDOW)[:NUM_WINDOWS]


def with_experts(dense: LlamaArch) -> Llama4Arch:
    own = {field.name: getattr(dense, field.name) for field in fields(LlamaArch)}
    own["intermediate_size"] = dense.intermediate_size // 2
    every = frozenset(range(dense.num_layers))
    return Llama4Arch(
        **own,
        dense_intermediate_size=dense.intermediate_size,
        num_experts=EXPERTS,
        moe_layers=every,
        rope_layers=every,
        chunk_layers=frozenset(),
        attention_chunk=None,
        qk_norm=False,
        temperature=None,
        separate_experts=True,
    )


def reader(change: Change) -> Callable[[str], Tensor]:
    """Tensors by name; the experts' are changed."""
    arch = CHECKPOINT.arch

    def read(name: str) -> Tensor:
        if ".feed_forward.router." in name:  # the largest of opposite numbers, far from 0
            half = torch.randn(EXPERTS // 2, arch.hidden_size) * 1000
            return torch.cat((half, -half))
        if ".feed_forward." not in name:
            found = CHECKPOINT.tensor(name)
            return paired(found, arch.head_dim) if ".q_proj" in name or ".k_proj" in name else found
        layer, _, part = name.partition(".feed_forward.")
        dense = CHECKPOINT.tensor(f"{layer}.mlp.{'.'.join(part.split('.')[-2:])}").float()
        shared, routed = dense.chunk(2, dim=1 if "down_proj" in part else 0)
        return change(routed.contiguous()) if part.startswith("experts") else shared

    return read


def paired(weight: Tensor, head_dim: int) -> Tensor:
    """Queries or keys with rows that rotate together side by side, as Meta stores them."""
    heads = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def perplexity(ops: Ops, windows: list[list[int]], change: Change = lambda weight: weight) -> float:
    place = Place(ops, DTYPE, torch.device("cpu"), weights="plain")
    model = load_target(with_experts(CHECKPOINT.arch), reader(change), place, WINDOW)
    target = FrozenTarget(model, ops, (), DTYPE)
    sums = torch.zeros(3, dtype=torch.float64)
    for window in windows:
        own = scores(target, window)
        sums += measures(own, own, window)
    return math.exp(sums[0].item() / (len(windows) * WINDOW // 2))


@pytest.fixture(scope="module")
def plain(native_ops: Ops, windows: list[list[int]]) -> float:
    return perplexity(native_ops, windows)


def test_a_model_with_experts_computes_what_the_dense_one_does(
    native_ops: Ops, windows: list[list[int]], plain: float
) -> None:
    place = Place(native_ops, DTYPE, torch.device("cpu"), weights="plain")
    model = load_target(CHECKPOINT.arch, CHECKPOINT.stored, place, WINDOW)
    target = FrozenTarget(model, native_ops, (), DTYPE)
    own = [scores(target, window) for window in windows]
    loss = sum(float(measures(o, o, w)[0]) for o, w in zip(own, windows, strict=True))
    assert plain == pytest.approx(math.exp(loss / (len(windows) * WINDOW // 2)), rel=3e-3)


def test_experts_in_fp8_cost_less_than_one_per_cent(
    native_ops: Ops, windows: list[list[int]], plain: float
) -> None:
    found = perplexity(native_ops, windows, lambda weight: FP8_CHANNEL.write(weight)[1])
    assert found == pytest.approx(plain, rel=0.01)
    assert found != plain
