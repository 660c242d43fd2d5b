"""The sizes of a Llama, read from its config.json alone, whether or not it can be served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from configs.schema import ExpertCut
from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.config_values import flag, integer, number, table
from engine.parallel.shard import allowed_degrees, check_whole_experts, degree_fault, no_experts
from server.planning.formats import PartFormats, stored_formats

Json = Mapping[str, Any]
KNOWN = ("LlamaForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration")
NOPE_EVERY = 4  # Llama 4: every fourth layer attends to the whole context


@dataclass(frozen=True, slots=True)
class Experts:
    """A Llama 4's layers with experts."""

    num_layers: int  # that have experts
    num_experts: int
    per_token: int
    width: int  # of each expert, and of the shared one
    whole: bool = False  # whether GPUs hold whole ones, not a part of each


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Widths and counts of a model; nothing of its weights."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dense_width: int  # of the feed-forward in layers without experts
    vocab_size: int
    max_positions: int
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    experts: Experts | None = None
    local_layers: int = 0  # that attend within chunks of the context
    local_chunk: int = 0  # tokens
    qk_norm: bool = False
    # Context length from which on layers without rotary embeddings scale queries; 0: they do not
    temperature_floor: int = 0
    formats: PartFormats = field(default_factory=PartFormats)

    @classmethod
    def from_config(cls, config: Json, plain: str = "bf16") -> ModelSizes:
        """Read a config.json; `plain` is the format of weights that it does not quantise.

        Raises:
            ValueError: another architecture, a missing key, unknown quantisation.
        """
        _check_architecture(config)
        text = table(config, "text_config") or config
        num_layers, hidden = integer(text, "num_hidden_layers"), integer(text, "hidden_size")
        num_heads = integer(text, "num_attention_heads")
        llama4 = "num_local_experts" in text
        chunk = integer(text, "attention_chunk_size", 8192) if llama4 else 0
        return cls(
            hidden_size=hidden,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=integer(text, "num_key_value_heads", num_heads),
            head_dim=integer(text, "head_dim", hidden // num_heads),
            dense_width=integer(text, "intermediate_size_mlp" if llama4 else "intermediate_size"),
            vocab_size=integer(text, "vocab_size"),
            max_positions=integer(text, "max_position_embeddings", 2048),
            tied=flag(text, "tie_word_embeddings"),
            attention_bias=flag(text, "attention_bias"),
            mlp_bias=flag(text, "mlp_bias"),
            experts=_experts(text, num_layers) if llama4 else None,
            local_layers=_local_layers(text, num_layers) if llama4 else 0,
            local_chunk=chunk,
            qk_norm=llama4 and flag(text, "use_qk_norm", True),
            temperature_floor=_temperature_floor(text) if llama4 else 0,
            formats=stored_formats(config, plain),
        )

    @classmethod
    def of_arch(cls, arch: LlamaArch) -> ModelSizes:
        """Of a Llama 2 or 3, or of a head's decoder layers, in bfloat16."""
        return cls(
            hidden_size=arch.hidden_size,
            num_layers=arch.num_layers,
            num_heads=arch.num_heads,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            dense_width=arch.intermediate_size,
            vocab_size=arch.vocab_size,
            max_positions=arch.max_position_embeddings,
            tied=arch.tie_word_embeddings,
            attention_bias=arch.attention_bias,
            mlp_bias=arch.mlp_bias,
        )

    @property
    def arch(self) -> LlamaArch:
        """A dense Llama of these sizes."""
        return LlamaArch(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.dense_width,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=None,
            tie_word_embeddings=self.tied,
            attention_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            max_position_embeddings=self.max_positions,
        )

    @property
    def num_dense_layers(self) -> int:
        return self.num_layers - (self.experts.num_layers if self.experts else 0)

    def with_experts(self, cut: ExpertCut) -> ModelSizes:
        """With experts spread so over GPUs. ValueError if there are none to spread."""
        if cut == "tensor":
            return self
        if self.experts is None:
            raise no_experts()
        return replace(self, experts=replace(self.experts, whole=True))

    def check_ranks(self, ranks: int) -> None:
        """ValueError with the possible numbers if the model cannot be cut over `ranks` GPUs."""
        fault = degree_fault(self.arch, ranks)
        width = self.experts.width if self.experts else 0
        if fault is None and width % ranks:
            fault = f"experts of width {width} do not divide by {ranks}"
        if fault is None and self.experts and self.experts.whole:
            check_whole_experts(self.experts.num_experts, ranks)
        if fault is not None:
            allowed = [n for n in allowed_degrees(self.arch) if width % n == 0]
            raise ValueError(
                f"parallel.tensor = {ranks}: {fault}; this model allows "
                f"{', '.join(map(str, allowed))}"
            )


def _check_architecture(config: Json) -> None:
    found: Sequence[str] = config.get("architectures") or ()
    if not found and config.get("model_type") in ("llama", "llama4", "llama4_text"):
        return
    if len(found) != 1 or found[0] not in KNOWN:
        named = list(found) or config.get("model_type")
        raise ValueError(f"architecture {named} cannot be planned; {', '.join(KNOWN)} can")


def _experts(text: Json, num_layers: int) -> Experts:
    step = integer(text, "interleave_moe_layer_step", 1)
    layers = text.get("moe_layers") or range(step - 1, num_layers, step)
    return Experts(
        num_layers=len(layers),
        num_experts=integer(text, "num_local_experts"),
        per_token=int(number(text, "num_experts_per_tok", 1)),
        width=integer(text, "intermediate_size"),
    )


def _temperature_floor(text: Json) -> int:
    return integer(text, "floor_scale", 8192) if flag(text, "attn_temperature_tuning", True) else 0


def _local_layers(text: Json, num_layers: int) -> int:
    """How many layers have rotary embeddings, and with them local attention."""
    named = text.get("no_rope_layers")
    every = integer(text, "no_rope_layer_interval", NOPE_EVERY)
    return sum(named) if named else num_layers - num_layers // every
