"""Llama 2 and 3.x: a pre-norm decoder with rotary grouped-query attention and SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.layers.attention import Attention
from engine.layers.embedding import LMHead, VocabParallelEmbedding
from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.rotary import cos_sin_table
from engine.models.arch import LlamaArch
from engine.runner.forward import ForwardBatch, ForwardContext
from kernels.ops import LinearWeight, Ops

ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    input_norm: RMSNorm
    attention: Attention
    post_attention_norm: RMSNorm
    mlp: GatedMLP

    def __call__(
        self, x: Tensor, residual: Tensor, batch: ForwardBatch, ctx: ForwardContext
    ) -> Tensor:
        """Take the last block's output and the residual stream [T, H], which it updates in place;
        return this block's output, not yet added."""
        x = self.attention(self.input_norm.add(x, residual, ctx), batch, ctx)
        return self.mlp(self.post_attention_norm.add(x, residual, ctx), ctx)


@dataclass(frozen=True, slots=True)
class Llama:
    """A loaded target (implements `TargetModel`)."""

    arch: LlamaArch
    embedding: VocabParallelEmbedding
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head: LMHead

    def forward(self, batch: ForwardBatch, ctx: ForwardContext) -> Tensor:
        x = self.embedding(batch.token_ids, ctx)  # [T, H]
        residual = torch.zeros_like(x)
        for index, layer in enumerate(self.layers):
            self._tap(index, x, residual, ctx)
            x = layer(x, residual, batch, ctx)
        hidden = self.norm.add(x, residual, ctx)
        if ctx.tap is not None and len(self.layers) in ctx.tap.layers:
            ctx.tap.record(len(self.layers), hidden)
        return hidden

    def logits(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        return self.head(hidden, ctx)

    @staticmethod
    def _tap(index: int, x: Tensor, residual: Tensor, ctx: ForwardContext) -> None:
        if ctx.tap is not None and index in ctx.tap.layers:
            ctx.tap.record(index, x + residual)


class LlamaLoader:
    """Builds a `Llama` from tensors in Hugging Face names, fusing and packing as it reads."""

    def __init__(
        self,
        arch: LlamaArch,
        read: ReadTensor,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
        max_len: int,
    ) -> None:
        self._arch, self._read, self._ops = arch, read, ops
        self._dtype, self._device = dtype, device
        self._cos_sin = cos_sin_table(
            arch.head_dim, max_len, arch.rope_theta, arch.rope_scaling
        ).to(device)

    def load(self) -> Llama:
        arch = self._arch
        embedding = self._pack("model.embed_tokens")
        head = embedding if arch.tie_word_embeddings else self._pack("lm_head")
        return Llama(
            arch=arch,
            embedding=VocabParallelEmbedding(embedding),
            layers=tuple(self._layer(index) for index in range(arch.num_layers)),
            norm=self._norm("model.norm"),
            head=LMHead(head),
        )

    def _layer(self, index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        return DecoderLayer(
            input_norm=self._norm(f"{prefix}.input_layernorm"),
            attention=self._attention(index, f"{prefix}.self_attn"),
            post_attention_norm=self._norm(f"{prefix}.post_attention_layernorm"),
            mlp=self._mlp(f"{prefix}.mlp"),
        )

    def _attention(self, index: int, prefix: str) -> Attention:
        bias = self._arch.attention_bias
        projections = [f"{prefix}.{part}_proj" for part in "qkv"]
        return Attention(
            layer=index,
            qkv=ColumnParallelLinear(self._pack(*projections, bias=bias)),
            output=RowParallelLinear(self._pack(f"{prefix}.o_proj", bias=bias)),
            cos_sin=self._cos_sin,
            scale=self._arch.head_dim**-0.5,
        )

    def _mlp(self, prefix: str) -> GatedMLP:
        bias = self._arch.mlp_bias
        gate_up = self._pack(f"{prefix}.gate_proj", f"{prefix}.up_proj", bias=bias)
        return GatedMLP(
            gate_up=ColumnParallelLinear(gate_up),
            down=RowParallelLinear(self._pack(f"{prefix}.down_proj", bias=bias)),
        )

    def _norm(self, name: str) -> RMSNorm:
        weight = self._read(f"{name}.weight").to(self._device, torch.float32)
        return RMSNorm(weight, self._arch.rms_norm_eps)

    def _pack(self, *names: str, bias: bool = False) -> LinearWeight:
        """Stack the outputs of the named layers into one packed weight."""
        weight = self._stack(names, "weight").to(self._device, self._dtype)
        offset = self._stack(names, "bias").to(self._device, torch.float32) if bias else None
        return self._ops.pack_linear(weight, offset)

    def _stack(self, names: tuple[str, ...], kind: str) -> Tensor:
        parts = [self._read(f"{name}.{kind}") for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
