"""The shape of a Llama, read strictly from a Hugging Face configuration. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from engine.checkpoints.config_values import Json, flag, integer, number, require_positive
from engine.checkpoints.quantised.config import read_quantisation
from engine.checkpoints.rope_scaling import RopeScaling, read_rope

ARCHITECTURE = "LlamaForCausalLM"
ACTIVATIONS = ("silu", "swish")  # two names of one function

Shape = tuple[int, ...]

# Keys that change the computation of other architectures, with the values that mean Llama's own.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_temperature_tuning": (False,),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0, 1),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "scale_depth": (),
    "scale_emb": (1,),
    "sliding_window": (),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}


@dataclass(frozen=True, slots=True)
class LlamaArch:
    """The architecture of a Llama 2 or 3.x: everything except its weights."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_position_embeddings: int  # positions that it serves, those of its scaling included

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"):
            require_positive(name, getattr(self, name))
        for name in ("intermediate_size", "max_position_embeddings", "head_dim"):
            require_positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even, for rotary embeddings")

    @property
    def feed_forward_sizes(self) -> tuple[int, ...]:
        """The different widths of its feed-forward blocks."""
        return (self.intermediate_size,)

    @property
    def as_plain_llama(self) -> LlamaArch:
        """A plain Llama of the same widths, such as the layers of a draft head are."""
        return LlamaArch(**{name: getattr(self, name) for name in LlamaArch.__slots__})

    def layer_tensors(self, index: int) -> dict[str, Shape]:  # noqa: ARG002
        """Name after `model.layers.<index>.` -> shape; the same for every layer of a plain Llama.
        Linear weights are [out, in]."""
        return {
            **self.norm_tensors(),
            **self.attention_tensors(),
            **self.mlp_tensors("mlp", self.intermediate_size),
        }

    def norm_tensors(self) -> dict[str, Shape]:
        names = ("input_layernorm.weight", "post_attention_layernorm.weight")
        return dict.fromkeys(names, (self.hidden_size,))

    def attention_tensors(self) -> dict[str, Shape]:
        hidden = self.hidden_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden)}
        parts["o"] = (hidden, queries)
        return _linear_tensors("self_attn", parts, self.attention_bias)

    def mlp_tensors(self, block: str, inner: int) -> dict[str, Shape]:
        """A gated feed-forward of `inner` width, under the name `block`."""
        hidden = self.hidden_size
        parts = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        return _linear_tensors(block, parts, self.mlp_bias)

    @classmethod
    def from_hf_config(cls, config: Json) -> LlamaArch:
        """Read a config.json. Anything that would need other arithmetic raises ValueError."""
        _check_architecture(config)
        refuse_unsupported(config)
        num_heads = integer(config, "num_attention_heads")
        hidden_size = integer(config, "hidden_size")
        rope = read_rope(config)
        return cls(
            vocab_size=integer(config, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=integer(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=integer(config, "num_key_value_heads", num_heads),
            head_dim=integer(config, "head_dim", hidden_size // num_heads),
            intermediate_size=integer(config, "intermediate_size"),
            rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            tie_word_embeddings=flag(config, "tie_word_embeddings"),
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
            max_position_embeddings=rope.max_positions,
        )


def eos_token_ids(config: Json, generation_config: Json | None = None) -> tuple[int, ...]:
    """Ids that end a text: those of generation_config.json, where instruct models list several,
    then those of config.json."""
    ids: list[int] = []
    for table in (generation_config or {}, config):
        found = table.get("eos_token_id")
        listed = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(item) is int and item >= 0 for item in listed):
            raise ValueError(f"eos_token_id must be an id or a list of ids, not {found!r}")
        ids += listed
    return tuple(dict.fromkeys(ids))


def bos_token_id(config: Json) -> int | None:
    """The id that begins a text, if the model has one."""
    found = config.get("bos_token_id")
    if found is not None and type(found) is not int:
        raise ValueError(f"bos_token_id must be an id, not {found!r}")
    return found


def _linear_tensors(block: str, parts: Mapping[str, Shape], bias: bool) -> dict[str, Shape]:
    tensors: dict[str, Shape] = {}
    for part, shape in parts.items():
        tensors[f"{block}.{part}_proj.weight"] = shape
        if bias:
            tensors[f"{block}.{part}_proj.bias"] = shape[:1]
    return tensors


def _check_architecture(config: Json) -> None:
    architectures = config.get("architectures")
    if architectures is None:  # transformers leaves it out of models that were never saved
        architectures = [ARCHITECTURE] if config.get("model_type") == "llama" else []
    if list(architectures) != [ARCHITECTURE]:
        found = list(architectures) or config.get("model_type")
        raise ValueError(f"architecture {found} is not supported; {ARCHITECTURE} is")


def refuse_unsupported(
    config: Json, own: Collection[str] = (), layer_types: Collection[str] = ("full_attention",)
) -> None:
    """ValueError for what would need other arithmetic than a pre-norm decoder's. `own`: keys that
    the caller reads; `layer_types`: what it can compute."""
    if config.get("hidden_act", "silu") not in ACTIVATIONS:
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported; 'silu' is")
    _refuse_other_arithmetic(config, own)
    layers = set(config.get("layer_types") or ())
    if not layers <= set(layer_types):
        known = ", ".join(layer_types)
        raise ValueError(f"layer_types {sorted(layers)} are not supported; {known} is")
    read_quantisation(config)  # raises for one that is not implemented


def _refuse_other_arithmetic(config: Json, own: Collection[str]) -> None:
    """Keys of other architectures are refused unless they change nothing: a model that was trained
    with them gives wrong text without."""
    for key, neutral in NEUTRAL.items():
        found = config.get(key)
        if key in own or found is None or found in neutral or _is_unused(config, key):
            continue
        allowed = ", ".join(["null", *(str(item).lower() for item in neutral)])
        raise ValueError(f"{key} {found!r} is not supported; {allowed} is")


def _is_unused(config: Json, key: str) -> bool:
    """Whether a window is switched off, or is as long as the context."""
    if key != "sliding_window":
        return False
    window, positions = config[key], integer(config, "max_position_embeddings", 2048)
    return config.get("use_sliding_window") is False or (
        type(window) is int and window >= positions
    )
