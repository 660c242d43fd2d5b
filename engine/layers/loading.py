"""Building the blocks of a decoder layer from named tensors, fused and packed as they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.layers.attention import Attention
from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.models.arch import LlamaArch
from kernels.ops import LinearWeight, Ops

ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class LayerLoader:
    """Reads blocks under their Hugging Face names. Widths come from the tensors, which the caller
    has checked; head size, biases and epsilon come from `arch`."""

    arch: LlamaArch
    read: ReadTensor
    ops: Ops
    dtype: torch.dtype  # of packed weights
    device: torch.device
    cos_sin: Tensor  # [max_len, D] float32

    def attention(self, layer: int, prefix: str) -> Attention:
        """`layer` is the index of its pages; `prefix` ends in `self_attn`."""
        bias = self.arch.attention_bias
        projections = [f"{prefix}.{part}_proj" for part in "qkv"]
        return Attention(
            layer=layer,
            qkv=ColumnParallelLinear(self.pack(*projections, bias=bias)),
            output=RowParallelLinear(self.pack(f"{prefix}.o_proj", bias=bias)),
            cos_sin=self.cos_sin,
            scale=self.arch.head_dim**-0.5,
        )

    def mlp(self, prefix: str) -> GatedMLP:
        bias = self.arch.mlp_bias
        gate_up = self.pack(f"{prefix}.gate_proj", f"{prefix}.up_proj", bias=bias)
        return GatedMLP(
            gate_up=ColumnParallelLinear(gate_up),
            down=RowParallelLinear(self.pack(f"{prefix}.down_proj", bias=bias)),
        )

    def norm(self, name: str) -> RMSNorm:
        weight = self.read(f"{name}.weight").to(self.device, torch.float32)
        return RMSNorm(weight, self.arch.rms_norm_eps)

    def pack(self, *names: str, bias: bool = False) -> LinearWeight:
        """Stack the outputs of the named layers into one packed weight."""
        weight = self._stack(names, "weight").to(self.device, self.dtype)
        offset = self._stack(names, "bias").to(self.device, torch.float32) if bias else None
        return self.ops.pack_linear(weight, offset)

    def _stack(self, names: tuple[str, ...], kind: str) -> Tensor:
        parts = [self.read(f"{name}.{kind}") for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
