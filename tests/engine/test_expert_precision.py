"""What FP8 costs where experts are kept in it: the bundled model as a Llama 4.

Half of each feed-forward becomes the shared expert, the other half every one of four experts, and
the router's scores are 1. So the model computes what the dense one does, and routes every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.llama4_arch import Llama4Arch
from kernels.ops import Ops
from tests.support.files.quantised_files import FP8_CHANNEL
from tests.support.machine.threads import own_torch_threads
from tests.support.models.perplexity import (
    CHECKPOINT,
    Windows,
    perplexity,
    rounding_inputs,
    windows,
)

pytestmark = pytest.mark.extended
EXPERTS, NUM_WINDOWS = 4, 2
Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def texts(native_cache: Path) -> Iterator[Windows]:
    with own_torch_threads():
        yield windows(native_cache, NUM_WINDOWS)


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


def of_experts(ops: Ops, texts: Windows, change: Change = lambda weight: weight) -> float:
    return perplexity(with_experts(CHECKPOINT.arch), reader(change), ops, texts)


@pytest.fixture(scope="module")
def plain(native_ops: Ops, texts: Windows) -> float:
    return of_experts(native_ops, texts)


def test_a_model_with_experts_computes_what_the_dense_one_does(
    native_ops: Ops, texts: Windows, plain: float
) -> None:
    dense = perplexity(CHECKPOINT.arch, CHECKPOINT.stored, native_ops, texts)
    assert plain == pytest.approx(dense, rel=3e-3)


def test_experts_in_fp8_cost_less_than_one_per_cent(
    native_ops: Ops, texts: Windows, plain: float
) -> None:
    found = of_experts(native_ops, texts, in_fp8)
    assert found == pytest.approx(plain, rel=0.01)
    assert found != plain
    # As on a GPU. In all products, not only in those of experts.
    rounded = of_experts(rounding_inputs(native_ops), texts, in_fp8)
    assert rounded == pytest.approx(found, rel=0.01)
    assert rounded != found


def in_fp8(weight: Tensor) -> Tensor:
    return FP8_CHANNEL.write(weight)[1]
