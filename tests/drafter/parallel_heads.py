"""Heads that draft in parallel, in the published layouts, and their formulas in plain torch and
float64, without our layers or operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.drafter.head_formulas import HeadFormulas
from tests.drafter.published_heads import (
    DRAFT_VOCAB,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    ROPE_SCALING,
    SHAPE,
    Layout,
    TargetWeights,
    midlayer,
    named,
    speculators,
)

MASK = 17  # the mask token
AUX = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class PEagleLayout(Layout):
    """EAGLE-3 and `mask_hidden`."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return super().shapes() | {"mask_hidden": (1, 1, self.num_taps * HIDDEN)}


@dataclass(frozen=True)
class DFlashLayout(Layout):
    """Layers as in Qwen3. `rename` of z-lab and speculators changes no name."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = super().shapes()
        for index in range(self.num_layers):
            name = f"layers.{index}"
            found[f"{name}.input_layernorm.weight"] = (HIDDEN,)
            found[f"{name}.self_attn.q_norm.weight"] = (HEAD_DIM,)
            found[f"{name}.self_attn.k_norm.weight"] = (HEAD_DIM,)
        inputs = (HIDDEN, self.num_taps * HIDDEN)
        norms = {"hidden_norm.weight": (HIDDEN,), "norm.weight": (HIDDEN,)}
        return found | {"fc.weight": inputs} | norms


QWEN3 = SHAPE | {"model_type": "qwen3", "num_hidden_layers": 2, "use_sliding_window": False}
Z_LAB = QWEN3 | {
    "architectures": ["DFlashDraftModel"],
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "num_target_layers": 8,
}
DFLASH = {"mask_token_id": MASK, "target_layer_ids": [1, 3, 5]}

PARALLEL_LAYOUTS: dict[str, Layout] = {
    "speculators-peagle": PEagleLayout(
        "eagle3",
        speculators(
            "peagle",
            draft_vocab_size=DRAFT_VOCAB,
            mask_token_id=MASK,
            norm_before_fc=True,
            fc_norm=True,
            transformer_layer_config=SHAPE | {"num_hidden_layers": 2},
            **{AUX: [1, 3, 6]},
        ),
        num_layers=2,
        draft_vocab=DRAFT_VOCAB,
        mapped=True,
        own=("embed_tokens", "lm_head"),
        norm_before_fc=True,
        fc_norm=True,
        taps=(1, 3, 6),
    ),
    "vllm-peagle": PEagleLayout(
        "eagle3",
        named("LlamaForCausalLMEagle3", ptd_token_id=MASK, norm_before_residual=True),
        midlayer,
        own=("lm_head",),
        norm_before_residual=True,
    ),
    "z-lab-dflash": DFlashLayout(
        "eagle",
        Z_LAB | {"block_size": 8, "dflash_config": DFLASH, "rope_scaling": ROPE_SCALING},
        num_layers=2,
        taps=(2, 4, 6),
        scaling=ROPE_SCALING,
    ),
    "speculators-dflash": DFlashLayout(
        "eagle",
        speculators(
            "dflash",
            transformer_layer_config=QWEN3 | {"num_hidden_layers": 1, "attention_bias": True},
            block_size=8,
            mask_token_id=MASK,
            draft_vocab_size=DRAFT_VOCAB,
            aux_hidden_state_layer_ids=[1, 7],
            sample_from_anchor=False,
        ),
        num_taps=2,
        attention_bias=True,
        draft_vocab=DRAFT_VOCAB,
        mapped=True,
        own=("embed_tokens", "lm_head"),
        taps=(1, 7),
    ),
}


class PEagleFormulas(HeadFormulas):
    """Masks follow the entries, and everything is causal (arXiv:2602.01469)."""

    def draft(self, fused: Tensor, ids: Tensor, depth: int) -> Tensor:
        """[depth, H] for the tokens after the last entry, from all entries' fused features."""
        parts = self.tensors["mask_hidden"].flatten().split(HIDDEN)
        mask = self.fuse(tuple(part[None] for part in parts))
        features = torch.cat((fused.double(), mask.expand(depth - 1, -1)))
        every = torch.cat((ids, torch.full((depth - 1,), MASK)))
        return self.states(features, every, torch.arange(1, 1 + len(every)))[-depth:]


class DFlashFormulas(HeadFormulas):
    """The block sees itself and the target's features, each at its own position
    (arXiv:2602.06036)."""

    def fuse(self, features: tuple[Tensor, ...]) -> Tensor:
        x = torch.cat([feature.double() for feature in features], dim=-1)
        return self.norm(self.linear(x, "fc"), "hidden_norm")

    def draft(self, fused: Tensor, ids: Tensor, depth: int) -> Tensor:
        """The same; entry i is of token i + 1 and holds the feature of token i."""
        fused = fused.double()
        block = torch.cat((ids[-1:], torch.full((depth,), MASK)))
        stream = self.tensors["embed_tokens.weight"][block]
        positions = torch.arange(len(fused) + len(block))  # of the context, then of the block
        for index in range(self.layout.num_layers):
            name = f"layers.{index}"
            x = self.norm(stream, f"{name}.input_layernorm")
            stream = stream + self.mixed(x, fused, f"{name}.self_attn", positions)
            stream = stream + self.mlp(self.norm(stream, f"{name}.post_attention_layernorm"), name)
        return self.norm(stream, "norm")[1:]

    def mixed(self, x: Tensor, fused: Tensor, name: str, positions: Tensor) -> Tensor:
        both = torch.cat((fused, x))

        def heads(of: Tensor, part: str, count: int) -> Tensor:
            return self.linear(of, f"{name}.{part}_proj").view(len(of), count, HEAD_DIM)

        queries = self.norm(heads(x, "q", HEADS), f"{name}.q_norm")
        keys = self.norm(heads(both, "k", KV_HEADS), f"{name}.k_norm")
        queries = self.rotate(queries, positions[len(fused) :])
        keys = self.rotate(keys, positions).repeat_interleave(HEADS // KV_HEADS, dim=1)
        values = heads(both, "v", KV_HEADS).repeat_interleave(HEADS // KV_HEADS, dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(HEAD_DIM)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values).reshape(len(x), -1)
        return self.linear(out, f"{name}.o_proj")

    def logits(self, states: Tensor) -> Tensor:
        return self.linear(states, "lm_head")


def formulas_of(layout: Layout, target: TargetWeights) -> PEagleFormulas | DFlashFormulas:
    kind = DFlashFormulas if isinstance(layout, DFlashLayout) else PEagleFormulas
    return kind(layout, target)
