"""Draft heads as differentiable modules: the arithmetic of drafter/heads, for training.

Parameters carry the common names of drafter/manifest.py, so `state_dict` is what a head's file
holds and `load_state_dict` takes what `random_tensors` or a published file gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from drafter.heads.config import HeadConfig
from engine.checkpoints.arch import LlamaArch
from engine.models.rope import cos_sin_table


class TrainableNorm(nn.Module):
    """RMS normalisation in float32 (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        shape = list(self.weight.shape)
        return functional.rms_norm(x.float(), shape, self.weight, self._eps)


@dataclass(slots=True)
class StepKeys:
    """Keys and values that the queries of a layer may see: those of the true entries, and one more
    pair per unrolled step."""

    keys: Tensor  # [B, S, Hkv, D] of step 0
    values: Tensor
    first: Tensor  # [B, R] int32: each row sees the keys from this one
    last: Tensor  # ... to this one
    later: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # [B, R, Hkv, D] each

    def visible(self) -> Tensor:
        """[B, R, S] bool: the keys that each row sees."""
        places = torch.arange(self.keys.shape[1], device=self.keys.device)
        first, last = self.first.unsqueeze(-1), self.last.unsqueeze(-1)
        return (places >= first) & (places <= last)


Attend = Callable[[Tensor, StepKeys], Tensor]  # as `attend` below


class TrainableAttention(nn.Module):
    """Grouped-query attention with rotary positions, over true entries and unrolled ones."""

    def __init__(self, arch: LlamaArch, input_size: int) -> None:
        super().__init__()
        self._arch = arch
        self.attend: Attend = attend
        bias, dim = arch.attention_bias, arch.head_dim
        self.q_proj = nn.Linear(input_size, arch.num_heads * dim, bias)
        self.k_proj = nn.Linear(input_size, arch.num_kv_heads * dim, bias)
        self.v_proj = nn.Linear(input_size, arch.num_kv_heads * dim, bias)
        self.o_proj = nn.Linear(arch.num_heads * dim, arch.hidden_size, bias)

    def keys_values(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, ...] inputs, [B, N, D] cosines and sines -> keys, values [B, N, Hkv, D]."""
        x = narrowed(x)
        return rotate(self._heads(self.k_proj(x)), rotary), self._heads(self.v_proj(x))

    def forward(self, x: Tensor, rotary: Tensor, seen: StepKeys) -> Tensor:
        """[B, R, ...] inputs -> [B, R, H]."""
        mixed: Tensor = self.o_proj(self.attend(rotate(self._heads(self.q_proj(x)), rotary), seen))
        return mixed

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self._arch.head_dim)


def attend(queries: Tensor, seen: StepKeys) -> Tensor:
    """[B, R, Hq, D] rotated queries -> [B, R, Hq D]. Row r sees the true entries that `seen`
    names, and only its own entry of each later step (EAGLE-3's training-time test)."""
    num_kv_heads, dim = seen.keys.shape[2:]
    batch_size, num_rows = queries.shape[:2]
    grouped = queries.view(batch_size, num_rows, num_kv_heads, -1, dim) * dim**-0.5
    keys, values = seen.keys.to(queries.dtype), seen.values.to(queries.dtype)
    scores = wide(torch.einsum("brkgd,bskd->bkgrs", grouped, keys))
    scores = scores.masked_fill(~seen.visible()[:, None, None], float("-inf"))
    own = [torch.einsum("brkgd,brkd->bkgr", grouped, k.to(queries.dtype)) for k, _ in seen.later]
    scores = torch.cat((scores, *(wide(o).unsqueeze(-1) for o in own)), dim=-1)
    weights = scores.softmax(dim=-1).to(queries.dtype)
    num_true = keys.shape[1]
    mixed = torch.einsum("bkgrs,bskd->brkgd", weights[..., :num_true], values)
    for step, (_, value) in enumerate(seen.later):
        weight = weights[..., num_true + step].permute(0, 3, 1, 2)  # [B, R, Hkv, G]
        mixed = mixed + weight.unsqueeze(-1) * value.to(queries.dtype).unsqueeze(3)
    return mixed.flatten(2)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def narrowed(x: Tensor) -> Tensor:
    """In the type of the products that follow, so that several of them share one conversion."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else wide(x)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of [B, N, heads, D] by [B, N, D] cosines, then sines."""
    cos, sin = rotary.unsqueeze(2).chunk(2, dim=-1)
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


class TrainableMLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, arch: LlamaArch) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, arch.mlp_bias)
        self.up_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, arch.mlp_bias)
        self.down_proj = nn.Linear(arch.intermediate_size, arch.hidden_size, arch.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = narrowed(x)
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class TrainableLayer(nn.Module):
    """A decoder layer; the norms before it depend on the kind of head and the layer's place."""

    input_layernorm: TrainableNorm
    hidden_norm: TrainableNorm  # EAGLE-3, first layer
    post_attention_layernorm: TrainableNorm

    def __init__(self, arch: LlamaArch, input_size: int, norms: tuple[str, ...]) -> None:
        super().__init__()
        self.self_attn = TrainableAttention(arch, input_size)
        self.mlp = TrainableMLP(arch)
        for name in (*norms, "post_attention_layernorm"):
            setattr(self, name, TrainableNorm(arch.hidden_size, arch.rms_norm_eps))

    def forward(self, x: Tensor, stream: Tensor, rotary: Tensor, seen: StepKeys) -> Tensor:
        """The prepared input and the residual stream [B, R, H] -> the stream after the layer."""
        stream = stream + self.self_attn(x, rotary, seen)
        out: Tensor = stream + self.mlp(self.post_attention_layernorm(stream))
        return out


class DraftNetwork(nn.Module, ABC):
    """The parts of any head that training calls: `fuse`, `enter`, the layers, `leave`.

    `leave` returns the state, which is the feature of the next entry, and the input of the LM head.
    """

    embedding: Tensor  # [V, H target], frozen
    rotary: Tensor  # [max_len, D] cosines, then sines

    def __init__(self, config: HeadConfig, embedding: Tensor, max_len: int) -> None:
        """`max_len`: number of positions, those of unrolled steps included."""
        super().__init__()
        arch = config.arch
        self.config = config
        self.layers = nn.ModuleList()
        self.register_buffer("embedding", embedding, persistent=False)
        table = cos_sin_table(arch.head_dim, max_len, arch.rope_theta, arch.rope_scaling)
        self.register_buffer("rotary", table, persistent=False)

    @abstractmethod
    def fuse(self, taps: Tensor) -> Tensor:
        """[B, S, feature_size] taps of the target -> [B, S, H] features."""

    @abstractmethod
    def enter(self, token_ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's input and the residual stream [B, N, H]."""

    def next_entry(self, token_ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens [B, N] and features [B, N, H] of unrolled entries, from the tokens there and
        the states before them."""
        return token_ids, states

    @abstractmethod
    def leave(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The state and the input of the LM head, each [B, N, H]."""

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """[Vd, H] LM head: trained, or the target's."""

    def layer_input(self, index: int, x: Tensor, stream: Tensor) -> Tensor:
        """The input of layer `index`; for the first, `x` from `enter`."""
        if index == 0:
            return x
        normed: Tensor = self.layer(index).input_layernorm(stream)
        return normed

    def layer(self, index: int) -> TrainableLayer:
        found = self.layers[index]
        assert isinstance(found, TrainableLayer)
        return found

    def choose_attention(self, attend: Attend) -> None:
        """Let all layers attend with `attend`."""
        for index in range(len(self.layers)):
            self.layer(index).self_attn.attend = attend

    def embed(self, token_ids: Tensor) -> Tensor:
        return functional.embedding(token_ids, self.embedding).float()


class Eagle3Network(DraftNetwork):
    """EAGLE-3 (arXiv:2503.01840)."""

    def __init__(self, config: HeadConfig, embedding: Tensor, max_len: int) -> None:
        super().__init__(config, embedding, max_len)
        arch = config.arch
        hidden, eps = arch.hidden_size, arch.rms_norm_eps
        self.fc = nn.Linear(config.feature_size, hidden, bool(config.fc_bias))
        norms = [("input_layernorm", "hidden_norm"), *[("input_layernorm",)] * arch.num_layers]
        self.layers = nn.ModuleList(
            TrainableLayer(arch, hidden * (2 if index == 0 else 1), norms[index])
            for index in range(arch.num_layers)
        )
        self.norm = TrainableNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)

    def fuse(self, taps: Tensor) -> Tensor:
        fused: Tensor = self.fc(narrowed(taps))
        return fused.float()

    def enter(self, token_ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        first = self.layer(0)
        normed: Tensor = first.hidden_norm(features)
        embedded = first.input_layernorm(self.embed(token_ids))
        x = torch.cat((narrowed(embedded), narrowed(normed)), dim=-1)
        return x, normed if self.config.norm_before_residual else features

    def leave(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        return stream, self.norm(stream)

    @property
    def head_weight(self) -> Tensor:
        return self.lm_head.weight


class PEagleNetwork(Eagle3Network):
    """P-EAGLE (arXiv:2602.01469): unrolled entries do not know the tokens and states before."""

    def __init__(self, config: HeadConfig, embedding: Tensor, max_len: int) -> None:
        super().__init__(config, embedding, max_len)
        assert config.mask_token_id is not None
        self._mask_token = config.mask_token_id
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, config.feature_size))

    def next_entry(self, token_ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.fuse(self.mask_hidden).expand_as(states)
        return torch.full_like(token_ids, self._mask_token), feature


class EagleNetwork(DraftNetwork):
    """EAGLE-1/2 (arXiv:2401.15077) and, with `dense`, the head of arXiv:2508.08192, which has
    several ordinary layers with all norms. The LM head is the target's, frozen."""

    target_head: Tensor  # [V, H]

    def __init__(
        self, config: HeadConfig, embedding: Tensor, lm_head: Tensor, max_len: int, dense: bool
    ) -> None:
        super().__init__(config, embedding, max_len)
        arch = config.arch
        self.fc = nn.Linear(2 * arch.hidden_size, arch.hidden_size, bool(config.fc_bias))
        self.layers = nn.ModuleList(
            TrainableLayer(arch, arch.hidden_size, ("input_layernorm",) if index or dense else ())
            for index in range(arch.num_layers)
        )
        if dense:
            self.norm = TrainableNorm(arch.hidden_size, arch.rms_norm_eps)
        self._dense = dense
        self.register_buffer("target_head", lm_head, persistent=False)

    def fuse(self, taps: Tensor) -> Tensor:
        return taps.float()

    def enter(self, token_ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        stream: Tensor = self.fc(torch.cat((self.embed(token_ids), features), dim=-1)).float()
        return self.layer(0).input_layernorm(stream) if self._dense else stream, stream

    def leave(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        state = self.norm(stream) if self._dense else stream
        return state, state

    @property
    def head_weight(self) -> Tensor:
        return self.target_head
