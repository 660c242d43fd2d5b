"""The perplexity of the bundled model, with weights and inputs of products changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.accuracy import TEXT, WINDOW, cut, measures, scores
from configs.load import load_config
from configs.schema import WeightForm
from drafter.train.data.target import FrozenTarget
from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.source import BUNDLED_ALIAS, resolve_source
from engine.checkpoints.stored import ReadStored
from engine.models.families import load_target
from engine.models.place import Place
from kernels.linear.quantised import Part
from kernels.linear.scaled import FP8, LARGEST
from kernels.moe.reference import route
from kernels.ops import ExpertWeights, LinearWeight, Ops
from server.text.chat_codec import load_codec
from tests.support.configurations import hosted

CPU, DTYPE = torch.device("cpu"), torch.float32
CHECKPOINT = open_checkpoint(resolve_source(BUNDLED_ALIAS))
Change = Callable[[Tensor], Part]
Windows = Sequence[Sequence[int]]


def windows(cache: Path, count: int) -> list[list[int]]:
    """The first ones of a text that the model has not seen."""
    codec = load_codec(hosted(load_config(None, [f"files.dir={cache}"])))
    return cut(codec.tokenizer.encode(TEXT.read_text(encoding="utf-8"), False), WINDOW)[:count]


def changed(change: Change) -> ReadStored:
    """The bundled model's tensors; those of linear layers are changed."""

    def read(name: str) -> Part:
        tensor = CHECKPOINT.tensor(name)
        return change(tensor.float()) if "_proj." in name else tensor

    return read


def perplexity(
    arch: LlamaArch, read: ReadStored, ops: Ops, texts: Windows, form: WeightForm = "plain"
) -> float:
    """Of the second halves of the texts."""
    model = load_target(arch, read, Place(ops, DTYPE, CPU, weights=form), WINDOW)
    target, sums = FrozenTarget(model, ops, (), DTYPE), torch.zeros(3, dtype=torch.float64)
    for text in texts:
        own = scores(target, text)
        sums += measures(own, own, text)
    return math.exp(sums[0].item() / (len(texts) * WINDOW // 2))


def rounding_inputs(ops: Ops) -> Ops:
    """`ops` with inputs of products rounded to FP8, but for those of the LM head and the router."""
    plain = (CHECKPOINT.arch.vocab_size, 4)  # outputs

    def linear(x: Tensor, weight: LinearWeight) -> Tensor:
        return ops.linear(x if weight.out_features in plain else rounded(x), weight)

    def moe(x: Tensor, logits: Tensor, weights: ExpertWeights) -> Tensor:
        scaled, chosen = route(x, logits)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows = chosen == expert
            both = ops.linear(rounded(scaled[rows]), weights.gate_up[expert])
            inner = rounded(ops.silu_and_mul(both))
            out[rows] = ops.linear(inner, weights.down[expert])
        return out

    return replace(ops, linear=linear, moe=moe, pack_layer=None, decoder_layers=None)


def rounded(x: Tensor) -> Tensor:
    """[T, K] rounded to FP8 with a scale for each row, as kernels/linear/triton_scaled.py does."""
    largest = x.abs().amax(1, keepdim=True)
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (x / scales).clamp(-LARGEST, LARGEST).to(FP8).float() * scales
