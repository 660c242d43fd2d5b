"""Synthetic draft heads in the published layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from drafter.heads import building
from drafter.heads.building import HeadBuilder
from engine.checkpoints.arch import LlamaArch
from engine.models.place import Place
from kernels.ops import LinearWeight, Ops

CPU = torch.device("cpu")
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB, DRAFT_VOCAB = 72, 6, 2, 20, 100, 131, 37
TARGET = LlamaArch(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_layers=8,
    num_heads=4,
    num_kv_heads=4,
    head_dim=18,
    intermediate_size=80,
    rms_norm_eps=1e-6,
    rope_theta=500000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    max_position_embeddings=512,
)
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
ROPE_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Layout:
    """One way to publish a head. `names` are the common names of its tensors."""

    kind: str  # eagle | dense | eagle3
    config: dict[str, Any]
    rename: Callable[[str], str] = lambda name: name
    num_layers: int = 1
    num_taps: int = 3
    draft_vocab: int = VOCAB
    mapped: bool = False  # has d2t and t2d
    fc_bias: bool = False
    attention_bias: bool = False
    own: tuple[str, ...] = ()  # embed_tokens, lm_head
    norm_before_residual: bool = False
    fuses: bool = True  # has `fc`
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    theta: float = 10000.0
    taps: tuple[int, ...] = (2, 4, 5)  # of the target's 8 layers
    shards: int = 1
    hidden: int = HIDDEN
    scaling: dict[str, Any] | None = field(default=None)

    @property
    def is_trainable(self) -> bool:
        """Whether training knows all its parts. It shares the target's widths."""
        more_norms = self.norm_before_fc or self.fc_norm or self.norm_output
        return self.hidden == HIDDEN and self.fuses and not more_norms

    def shapes(self) -> dict[str, tuple[int, ...]]:
        h, first = self.hidden, 2 * self.hidden if self.kind == "eagle3" else self.hidden
        queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        inputs = self.num_taps * HIDDEN if self.kind == "eagle3" else 2 * h
        shapes: dict[str, tuple[int, ...]] = {"fc.weight": (h, inputs)} if self.fuses else {}
        shapes |= {"input_norm.weight": (inputs,)} if self.norm_before_fc else {}
        if self.fc_norm:
            shapes |= {f"fc_norm.{index}.weight": (HIDDEN,) for index in range(self.num_taps)}
        shapes |= {"fc.bias": (h,)} if self.fc_bias else {}
        for index in range(self.num_layers):
            width = h if index else first
            layer: dict[str, tuple[int, ...]] = {
                "self_attn.q_proj.weight": (queries, width),
                "self_attn.k_proj.weight": (keys, width),
                "self_attn.v_proj.weight": (keys, width),
                "self_attn.o_proj.weight": (h, queries),
                "mlp.gate_proj.weight": (INNER, h),
                "mlp.up_proj.weight": (INNER, h),
                "mlp.down_proj.weight": (h, INNER),
                "post_attention_layernorm.weight": (h,),
            }
            if self.attention_bias:
                layer |= {
                    f"self_attn.{part}_proj.bias": layer[f"self_attn.{part}_proj.weight"][:1]
                    for part in "qkvo"
                }
            if index or self.kind != "eagle":
                layer["input_layernorm.weight"] = (h,)
            if index == 0 and self.kind == "eagle3":
                layer["hidden_norm.weight"] = (h,)
            shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
        if self.kind != "eagle":
            shapes["norm.weight"] = (h,)
        rows = {"embed_tokens": VOCAB, "lm_head": self.draft_vocab}
        return shapes | {f"{name}.weight": (rows[name], h) for name in self.own}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by common name; equal for equal layouts."""
        generator = torch.Generator().manual_seed(3)
        found = {}
        for name, shape in self.shapes().items():
            is_norm = name.endswith("norm.weight") or name.startswith("fc_norm")
            mean, std = (1.0, 0.2) if is_norm else (0.0, 0.15)
            found[name] = mean + std * torch.randn(shape, generator=generator)
        if self.mapped:
            ids = self.target_ids()
            found["d2t"] = ids - torch.arange(self.draft_vocab)
            found["t2d"] = torch.zeros(VOCAB, dtype=torch.bool)
            found["t2d"][ids] = True
        return found

    def target_ids(self) -> Tensor:
        shuffled = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))
        return shuffled[: self.draft_vocab].sort().values

    def write(
        self,
        folder: Path,
        change: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
        **config: object,
    ) -> Path:
        """Fill `folder`, after `change` has edited the tensors, which have published names."""
        tensors = {self.rename(name): tensor for name, tensor in self.tensors().items()}
        change(tensors)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config | config), encoding="utf-8")
        names = list(tensors)
        for shard in range(self.shards):
            part = {name: tensors[name] for name in names[shard :: self.shards]}
            suffix = "" if self.shards == 1 else f"-{shard + 1:05}-of-{self.shards:05}"
            save_file(part, folder / f"model{suffix}.safetensors")
        return folder


def midlayer(name: str) -> str:
    return name.replace("layers.0.", "midlayer.")


def below_model(name: str) -> str:
    return name if name.startswith(("lm_head", "d2t", "t2d")) else f"model.{name}"


def of_meta(name: str) -> str:
    return name.replace(".mlp.", ".feed_forward.")


def of_speculators(name: str) -> str:
    return name.replace("layers.0.", "transformer.").replace("fc.", "fusion_fc.")


def of_old_vllm(name: str) -> str:
    return name if name.startswith("fc") else f"model.{below_model(name)}"


def of_sglang(name: str) -> str:
    for index, part in enumerate(("low", "mid", "high")):
        name = name.replace(f"fc_norm.{index}", f"aux_norm_{part}")
    return midlayer(name)


def of_vllm(name: str) -> str:
    return "draft_id_to_target_id" if name == "d2t" else below_model(name)


def named(architecture: str, **more: object) -> dict[str, Any]:
    return SHAPE | {"architectures": [architecture]} | more


def speculators(kind: str, **more: object) -> dict[str, Any]:
    return {"speculators_model_type": kind, "transformer_layer_config": SHAPE} | more


LAYOUTS = {
    "reference-eagle": Layout("eagle", named("LlamaForCausalLM", bias=False)),
    "reference-eagle-with-bias": Layout(
        "eagle",
        named("LlamaForCausalLM", bias=True, num_hidden_layers=2, rope_theta=2000.0),
        num_layers=2,
        fc_bias=True,
        own=("embed_tokens",),
        theta=2000.0,
    ),
    "vllm-eagle": Layout(
        "eagle", named("EagleLlamaForCausalLM"), below_model, own=("embed_tokens", "lm_head")
    ),
    "old-vllm-eagle": Layout(
        "eagle",
        {
            "architectures": ["EAGLEModel"],
            "model_type": "eagle",
            "model": SHAPE | {"architectures": ["LlamaForCausalLM"]},
            "eagle_fc_bias": True,
            "truncated_vocab_size": VOCAB,
        },
        of_old_vllm,
        fc_bias=True,
        own=("embed_tokens", "lm_head"),
    ),
    "speculators-eagle": Layout(
        "eagle",
        speculators("eagle", layernorms=False, fusion_bias=True),
        of_speculators,
        fc_bias=True,
    ),
    "meta-dense": Layout(
        "dense",
        named("EagleLlamaForCausalLM", num_hidden_layers=3, rope_scaling=ROPE_SCALING),
        of_meta,
        num_layers=3,
        scaling=ROPE_SCALING,
    ),
    "reference-eagle3": Layout(
        "eagle3",
        named("LlamaForCausalLM", draft_vocab_size=DRAFT_VOCAB),
        midlayer,
        draft_vocab=DRAFT_VOCAB,
        mapped=True,
        own=("lm_head",),
    ),
    "specforge-eagle3": Layout(
        "eagle3",
        named("LlamaForCausalLMEagle3", draft_vocab_size=DRAFT_VOCAB, attention_bias=True),
        midlayer,
        draft_vocab=DRAFT_VOCAB,
        mapped=True,
        own=("lm_head",),
        attention_bias=True,
        shards=2,
    ),
    "nvidia-eagle3": Layout(
        "eagle3",
        named(
            "LlamaForCausalLMEagle3",
            eagle_config={
                "eagle_aux_hidden_state_layer_ids": [0, 3, 6],
                "use_aux_hidden_state": True,
            },
            norm_before_residual=False,
        ),
        midlayer,
        own=("lm_head",),
        taps=(1, 4, 7),
    ),
    "speculators-eagle3": Layout(
        "eagle3",
        speculators(
            "eagle3",
            draft_vocab_size=DRAFT_VOCAB,
            norm_before_residual=True,
            target_hidden_size=None,
            eagle_aux_hidden_state_layer_ids=[1, 3],
        ),
        fc_bias=True,
        num_taps=2,
        draft_vocab=DRAFT_VOCAB,
        mapped=True,
        own=("embed_tokens", "lm_head"),
        norm_before_residual=True,
        taps=(1, 3),
    ),
    "speculators-eagle3.1": Layout(
        "eagle3",
        speculators(
            "eagle3",
            draft_vocab_size=DRAFT_VOCAB,
            norm_before_residual=True,
            norm_before_fc=True,
            norm_output=True,
            eagle_aux_hidden_state_layer_ids=[1, 3, 8],  # the last one: after all layers
            num_aux_hidden_states=3,
        ),
        draft_vocab=DRAFT_VOCAB,
        mapped=True,
        own=("lm_head",),
        norm_before_residual=True,
        norm_before_fc=True,
        norm_output=True,
        taps=(1, 3, -1),
    ),
    "sglang-eagle3-with-norms": Layout(
        "eagle3",
        named("LlamaForCausalLMEagle3", fc_norm=True, num_hidden_layers=2),
        of_sglang,
        num_layers=2,
        fc_norm=True,
    ),
    "nvidia-eagle3-of-the-last-hidden-state": Layout(
        "eagle3",
        named(
            "LlamaForCausalLMEagle3",
            eagle_config={"use_aux_hidden_state": False, "norm_output": True},
        ),
        midlayer,
        num_taps=1,
        fuses=False,
        norm_output=True,
        taps=(8,),  # the output of the final norm
    ),
    "vllm-eagle3-of-another-width": Layout(
        "eagle3",
        named(
            "Eagle3LlamaForCausalLM",
            num_hidden_layers=2,
            hidden_size=44,
            target_hidden_size=HIDDEN,
            draft_vocab_size=DRAFT_VOCAB,
        ),
        of_vllm,
        num_layers=2,
        draft_vocab=DRAFT_VOCAB,
        mapped=True,
        own=("embed_tokens", "lm_head"),
        hidden=44,
    ),
}


@dataclass(frozen=True)
class TargetWeights:
    """Embedding and LM head of the target, as tensors and packed."""

    ops: Ops
    embedding: Tensor
    lm_head: Tensor
    packed_embedding: LinearWeight
    packed_lm_head: LinearWeight

    @classmethod
    def of(cls, ops: Ops) -> TargetWeights:
        generator = torch.Generator().manual_seed(5)
        embedding, lm_head = torch.randn(2, VOCAB, HIDDEN, generator=generator) * 0.3
        return cls(
            ops,
            embedding,
            lm_head,
            ops.pack_linear(embedding, None),
            ops.pack_linear(lm_head, None),
        )

    def builder(self, target: LlamaArch = TARGET, max_len: int = 64) -> HeadBuilder:
        """Of heads for a whole target in float32."""
        shared = building.TargetWeights(target, self.packed_embedding, self.packed_lm_head)
        return HeadBuilder(shared, Place(self.ops, torch.float32, CPU), max_len)
