"""The formulas of draft heads over a whole sequence, in plain torch and float64, without our
layers or operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.drafter.published_heads import HEAD_DIM, HEADS, KV_HEADS, Layout, TargetWeights

EPS = 1e-5


class HeadFormulas:
    """One head of `layout`; entries are given in order of their positions."""

    def __init__(self, layout: Layout, target: TargetWeights) -> None:
        self.layout = layout
        self.tensors = {name: tensor.double() for name, tensor in layout.tensors().items()}
        self.tensors.setdefault("embed_tokens.weight", target.embedding.double())
        self.tensors.setdefault("lm_head.weight", target.lm_head.double())

    def fuse(self, features: tuple[Tensor, ...]) -> Tensor:
        if self.layout.kind != "eagle3":
            return features[0].double()
        parts = [feature.double() for feature in features]
        if self.layout.fc_norm:
            parts = [self.norm(part, f"fc_norm.{index}") for index, part in enumerate(parts)]
        x = torch.cat(parts, dim=-1)
        if self.layout.norm_before_fc:
            x = self.norm(x, "input_norm")
        return self.linear(x, "fc") if self.layout.fuses else x

    def states(self, features: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        embedded = self.tensors["embed_tokens.weight"][ids]
        features = features.double()
        if self.layout.kind == "eagle3":
            normed = self.norm(features, "layers.0.hidden_norm")
            x = torch.cat((self.norm(embedded, "layers.0.input_layernorm"), normed), dim=-1)
            stream = normed if self.layout.norm_before_residual else features
        else:
            stream = self.linear(torch.cat((embedded, features), dim=-1), "fc")
            dense = self.layout.kind == "dense"
            x = self.norm(stream, "layers.0.input_layernorm") if dense else stream
        for index in range(self.layout.num_layers):
            name = f"layers.{index}"
            if index:
                x = self.norm(stream, f"{name}.input_layernorm")
            stream = stream + self.attention(x, f"{name}.self_attn", positions)
            stream = stream + self.mlp(self.norm(stream, f"{name}.post_attention_layernorm"), name)
        is_normed = self.layout.kind == "dense" or self.layout.norm_output
        return self.norm(stream, "norm") if is_normed else stream

    def logits(self, states: Tensor) -> Tensor:
        if self.layout.kind == "eagle3" and not self.layout.norm_output:
            states = self.norm(states, "norm")
        return self.linear(states, "lm_head")

    def attention(self, x: Tensor, name: str, positions: Tensor) -> Tensor:
        def heads(part: str, count: int) -> Tensor:
            return self.linear(x, f"{name}.{part}_proj").view(len(x), count, HEAD_DIM)

        queries = self.rotate(heads("q", HEADS), positions)
        keys = self.rotate(heads("k", KV_HEADS), positions)
        keys = keys.repeat_interleave(HEADS // KV_HEADS, dim=1)
        values = heads("v", KV_HEADS).repeat_interleave(HEADS // KV_HEADS, dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(HEAD_DIM)
        later = positions[None, :] > positions[:, None]
        weights = scores.masked_fill(later, -math.inf).softmax(dim=-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, values).reshape(len(x), -1)
        return self.linear(mixed, f"{name}.o_proj")

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate = torch.nn.functional.silu(self.linear(x, f"{name}.mlp.gate_proj"))
        return self.linear(gate * self.linear(x, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")

    def linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.tensors.get(f"{name}.bias")
        return torch.nn.functional.linear(x, self.tensors[f"{name}.weight"], bias)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], EPS)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """As complex numbers: pair (i, i + D/2) times exp(i * angle)."""
        speeds = [self.speed(i) for i in range(HEAD_DIM // 2)]
        angles = positions.double()[:, None, None] * torch.tensor(speeds, dtype=torch.float64)
        low, high = x.chunk(2, dim=-1)
        turned = torch.complex(low, high) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def speed(self, i: int) -> float:
        """Radians per position of frequency i, slowed down as Llama 3.1 does."""
        speed = self.layout.theta ** (-2 * i / HEAD_DIM)
        scaling = self.layout.scaling
        if scaling is None:
            return float(speed)
        turns = scaling["original_max_position_embeddings"] * speed / (2 * math.pi)
        if turns < scaling["low_freq_factor"]:
            return float(speed / scaling["factor"])
        if turns > scaling["high_freq_factor"]:
            return float(speed)
        width = scaling["high_freq_factor"] - scaling["low_freq_factor"]
        keep = (turns - scaling["low_freq_factor"]) / width
        return float((1 - keep) * speed / scaling["factor"] + keep * speed)
