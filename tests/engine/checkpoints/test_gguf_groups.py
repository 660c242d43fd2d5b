"""Quantised GGUF blocks are read number for number; the gguf library is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engine.checkpoints.gguf_files.groups import READERS, grouped

N, K = 6, 512
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.mark.parametrize("kind", READERS)
def test_random_blocks_give_the_numbers_of_the_gguf_library(kind: str) -> None:
    random = np.random.default_rng(0)
    per_block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = random.integers(0, 256, (N * K // per_block, size), dtype=np.uint8)
    for first in HALVES.get(kind, (0,)):  # random bytes might be infinite factors
        factors = random.uniform(-0.1, 0.1, (len(blocks), 1)).astype(np.float16)
        blocks[:, first : first + 2] = factors.view(np.uint8)
    weight = grouped(kind, blocks.reshape(-1), (N, K))
    assert weight is not None
    expected = dequantize(blocks.reshape(N, -1), GGMLQuantizationType[kind])
    assert torch.equal(weight.dequantised(), torch.from_numpy(expected))


@pytest.mark.parametrize(("kind", "shape"), [("F16", (4, 32)), ("Q4_0", (32,))])
def test_other_kinds_and_vectors_have_no_groups(kind: str, shape: tuple[int, ...]) -> None:
    assert grouped(kind, np.zeros(18, dtype=np.uint8), shape) is None
