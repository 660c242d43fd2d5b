"""Untrained draft heads: the start of training, and for tests and benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from drafter.heads.config import HeadConfig
from drafter.manifest import D2T, EMBEDDING, T2D, head_tensors
from engine.checkpoints.arch import LlamaArch

INIT_STD = 0.02  # of linear weights, as in transformers' Llama


def eagle3_config(
    target: LlamaArch, draft_vocab_size: int | None = None, num_layers: int = 1
) -> HeadConfig:
    """An EAGLE-3 head with the target's widths, and with its vocabulary if no size is given."""
    arch = dataclasses.replace(
        target.as_plain_llama,
        num_layers=num_layers,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
    )
    size = target.vocab_size if draft_vocab_size is None else draft_vocab_size
    return HeadConfig("eagle3", arch, size, target.hidden_size)


def random_eagle3(
    config: HeadConfig, target: LlamaArch, seed: int, std: float = INIT_STD
) -> dict[str, Tensor]:
    """Float32 tensors by common name, for `save_eagle3`: norms of ones, biases of zeros, the rest
    drawn from N(0, std). The embedding is shared with the target, so it is included only if the
    widths differ."""
    if config.kind != "eagle3":
        raise ValueError(f"a head of kind {config.kind!r} is not 'eagle3'")
    expected = head_tensors(config, target, ())
    shapes = expected.required | expected.optional
    shapes = {name: shape for name, shape in shapes.items() if name not in (D2T, T2D)}
    if EMBEDDING in expected.optional:
        del shapes[EMBEDDING]
    return random_tensors(shapes, seed, std)


def random_tensors(
    shapes: Mapping[str, Sequence[int]], seed: int, std: float = INIT_STD
) -> dict[str, Tensor]:
    """Float32 tensors of the given shapes, by common name: norms of ones, biases of zeros, the rest
    drawn from N(0, std), in order."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(*shape)
        elif name.endswith(".bias"):
            tensors[name] = torch.zeros(*shape)
        else:
            tensors[name] = torch.randn(*shape, generator=generator) * std
    return tensors
