"""The shape of a Llama 4 text model, read strictly from a Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from engine.checkpoints.arch import LlamaArch, Shape, refuse_unsupported
from engine.checkpoints.config_values import Json, flag, integer, number, require_positive
from engine.checkpoints.rope_scaling import Llama3RopeScaling, read_rope

NO_CHUNKS = 0  # instead of a null, which means the default for other keys
CHUNKED, FULL = "chunked_attention", "full_attention"
# Keys that are refused for other models and are read here
OWN_KEYS = (
    "attn_temperature_tuning",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "use_qk_norm",
)
EXPERTS = "feed_forward.experts"
DEFAULTS = {  # as in transformers
    "attention_chunk_size": 8192,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "head_dim": 128,
    "hidden_size": 5120,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 131072,
    "no_rope_layer_interval": 4,
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_qk_norm": True,
    "vocab_size": 202048,
}


@dataclass(frozen=True, slots=True)
class AttentionTemperature:
    """Queries at position p are multiplied by 1 + scale * log(1 + floor((p + 1) / floor_scale))
    (arXiv:2501.19399)."""

    floor_scale: int
    scale: float


@dataclass(frozen=True, slots=True)
class Llama4Arch(LlamaArch):
    """The architecture of a Llama 4 text model. `intermediate_size` is the width of an expert and
    of the shared expert."""

    dense_intermediate_size: int  # of layers without experts
    num_experts: int
    moe_layers: frozenset[int]
    rope_layers: frozenset[int]  # the others use no positions
    chunk_layers: frozenset[int]  # those that see keys of their own chunk of positions only
    attention_chunk: int | None  # positions of a chunk
    qk_norm: bool  # in layers with rotary embeddings
    temperature: AttentionTemperature | None  # in layers without them
    separate_experts: bool = False  # experts are stored as linear layers

    def __post_init__(self) -> None:
        LlamaArch.__post_init__(self)
        require_positive("intermediate_size_mlp", self.dense_intermediate_size)
        require_positive("num_local_experts", self.num_experts)

    @property
    def feed_forward_sizes(self) -> tuple[int, ...]:
        is_used = {
            self.intermediate_size: bool(self.moe_layers),
            self.dense_intermediate_size: len(self.moe_layers) < self.num_layers,
        }
        return tuple(size for size, used in is_used.items() if used)

    def layer_tensors(self, index: int) -> dict[str, Shape]:
        return {
            **self.norm_tensors(),
            **self.attention_tensors(),
            **self._feed_forward_tensors(index),
        }

    def _feed_forward_tensors(self, index: int) -> dict[str, Shape]:
        """Experts in two tensors are [experts, in, out], unlike linear weights."""
        if index not in self.moe_layers:
            return self.mlp_tensors("feed_forward", self.dense_intermediate_size)
        count, hidden, inner = self.num_experts, self.hidden_size, self.intermediate_size
        return {
            "feed_forward.router.weight": (count, hidden),
            **self._expert_tensors(count, hidden, inner),
            **self.mlp_tensors("feed_forward.shared_expert", inner),
        }

    def _expert_tensors(self, count: int, hidden: int, inner: int) -> dict[str, Shape]:
        if not self.separate_experts:
            both, down = (count, hidden, 2 * inner), (count, inner, hidden)
            return {f"{EXPERTS}.gate_up_proj": both, f"{EXPERTS}.down_proj": down}
        tensors: dict[str, Shape] = {}
        for index in range(count):
            tensors |= self.mlp_tensors(f"{EXPERTS}.{index}", inner)
        return tensors

    @classmethod
    def from_hf_config(cls, config: Json) -> Llama4Arch:
        """Read a config.json, or its `text_config`. Anything that would need other arithmetic
        raises ValueError."""
        refuse_unsupported(config, OWN_KEYS, (FULL, CHUNKED))
        given = {key: found for key, found in config.items() if found is not None}
        if "attention_chunk_size" in config:
            given.setdefault("attention_chunk_size", NO_CHUNKS)
        config = DEFAULTS | given
        if integer(config, "num_experts_per_tok") != 1:
            raise ValueError(
                f"num_experts_per_tok {config['num_experts_per_tok']} is not supported; 1 is"
            )
        rope = read_rope(config)
        if not isinstance(rope.scaling, Llama3RopeScaling | None):
            raise ValueError(
                f"{rope.scaling} is not supported for Llama 4; rope types default and llama3 are"
            )
        num_heads = integer(config, "num_attention_heads")
        return cls(
            vocab_size=integer(config, "vocab_size"),
            hidden_size=integer(config, "hidden_size"),
            num_layers=integer(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=integer(config, "num_key_value_heads", num_heads),
            head_dim=integer(config, "head_dim"),
            intermediate_size=integer(config, "intermediate_size"),
            rms_norm_eps=number(config, "rms_norm_eps"),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            tie_word_embeddings=flag(config, "tie_word_embeddings"),
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=False,
            max_position_embeddings=rope.max_positions,
            dense_intermediate_size=integer(config, "intermediate_size_mlp"),
            num_experts=integer(config, "num_local_experts"),
            moe_layers=_moe_layers(config),
            rope_layers=_rope_layers(config),
            chunk_layers=_chunk_layers(config),
            attention_chunk=_chunk(config),
            qk_norm=flag(config, "use_qk_norm"),
            temperature=_temperature(config),
        )


def with_stored_experts(arch: LlamaArch, names: Collection[str]) -> LlamaArch:
    """`arch`, told whether its experts are stored as linear layers: a checkpoint has these
    tensors."""
    if not isinstance(arch, Llama4Arch) or not arch.moe_layers:
        return arch
    one = f"model.layers.{min(arch.moe_layers)}.{EXPERTS}.0.down_proj.weight"
    return replace(arch, separate_experts=one in names)


def _moe_layers(config: Json) -> frozenset[int]:
    """Indices, from a list or from the interval between them."""
    num_layers, listed = integer(config, "num_hidden_layers"), config.get("moe_layers")
    if listed is None:
        step = integer(config, "interleave_moe_layer_step")
        return frozenset(range(step - 1, num_layers, step))
    if not isinstance(listed, list) or not all(type(each) is int for each in listed):
        raise ValueError(f"moe_layers must be a list of layers, not {listed!r}")
    beyond = [each for each in listed if not 0 <= each < num_layers]
    if beyond:
        raise ValueError(f"moe_layers {beyond} are not among the layers 0 to {num_layers - 1}")
    return frozenset(listed)


def _rope_layers(config: Json) -> frozenset[int]:
    """Indices. In `no_rope_layers`, despite its name, 1 is a layer with rotary embeddings."""
    num_layers, listed = integer(config, "num_hidden_layers"), config.get("no_rope_layers")
    if not listed:
        interval = integer(config, "no_rope_layer_interval")
        return frozenset(index for index in range(num_layers) if (index + 1) % interval)
    if len(listed) != num_layers or not set(listed) <= {0, 1}:
        raise ValueError(f"no_rope_layers must have a 0 or 1 for each of {num_layers} layers")
    return frozenset(index for index, rotates in enumerate(listed) if rotates)


def _chunk_layers(config: Json) -> frozenset[int]:
    """Indices: those of `layer_types`, or all with rotary embeddings."""
    num_layers, kinds = integer(config, "num_hidden_layers"), config.get("layer_types")
    if _chunk(config) is None:
        return frozenset()
    if not kinds:
        return _rope_layers(config)
    if len(kinds) != num_layers:
        raise ValueError(f"layer_types names {len(kinds)} layers, not {num_layers}")
    return frozenset(index for index, kind in enumerate(kinds) if kind == CHUNKED)


def _chunk(config: Json) -> int | None:
    if config["attention_chunk_size"] == NO_CHUNKS:
        return None
    return integer(config, "attention_chunk_size")


def _temperature(config: Json) -> AttentionTemperature | None:
    if not config["attn_temperature_tuning"]:  # a flag, in the first configurations a number
        return None
    return AttentionTemperature(integer(config, "floor_scale"), number(config, "attn_scale"))
