"""The shape of a Llama, read strictly from a Hugging Face configuration. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ARCHITECTURE = "LlamaForCausalLM"
DEFAULT_ROPE_THETA = 10000.0
PLAIN_ROPE = (None, "none", "default")

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """Frequency scaling of Llama 3.1 and later."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int  # positions


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
    rope_scaling: Llama3RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_position_embeddings: int

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"):
            _require_positive(name, getattr(self, name))
        for name in ("intermediate_size", "max_position_embeddings", "head_dim"):
            _require_positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even, for rotary embeddings")

    @classmethod
    def from_hf_config(cls, config: Json) -> LlamaArch:
        """Read a config.json. Anything that would need other arithmetic raises ValueError."""
        _refuse_unsupported(config)
        num_heads = _integer(config, "num_attention_heads")
        hidden_size = _integer(config, "hidden_size")
        theta, scaling = _rope(config)
        return cls(
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=_integer(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_integer(config, "num_key_value_heads", num_heads),
            head_dim=_integer(config, "head_dim", hidden_size // num_heads),
            intermediate_size=_integer(config, "intermediate_size"),
            rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            attention_bias=_flag(config, "attention_bias"),
            mlp_bias=_flag(config, "mlp_bias"),
            max_position_embeddings=_integer(config, "max_position_embeddings", 2048),
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


def _refuse_unsupported(config: Json) -> None:
    architectures = config.get("architectures")
    if architectures is None:  # transformers leaves it out of models that were never saved
        architectures = [ARCHITECTURE] if config.get("model_type") == "llama" else []
    if list(architectures) != [ARCHITECTURE]:
        found = list(architectures) or config.get("model_type")
        raise ValueError(f"architecture {found} is not supported; {ARCHITECTURE} is")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported; 'silu' is")
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", quantization)
        raise ValueError(f"quantised weights ({method}) are not supported; F32, F16, BF16 are")


def _rope(config: Json) -> tuple[float, Llama3RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_scaling` (older)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope parameters must be a table, not {rope!r}")
    theta = _number(rope, "rope_theta", _number(config, "rope_theta", DEFAULT_ROPE_THETA))
    for table in (rope, config):
        if table.get("partial_rotary_factor") not in (None, 1, 1.0):
            factor = table["partial_rotary_factor"]
            raise ValueError(f"partial_rotary_factor {factor} is not supported; 1.0 is")
    kind = rope.get("rope_type", rope.get("type"))
    if kind in PLAIN_ROPE:
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope type {kind!r} is not supported; 'default' and 'llama3' are")
    return theta, _llama3_scaling(rope)


def _llama3_scaling(rope: Json) -> Llama3RopeScaling:
    scaling = Llama3RopeScaling(
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_position_embeddings=_integer(rope, "original_max_position_embeddings"),
    )
    if not scaling.low_freq_factor < scaling.high_freq_factor or scaling.factor < 1:
        raise ValueError(f"llama3 rope needs low < high frequency factors and factor >= 1: {rope}")
    return scaling


def _value(config: Json, key: str, default: object) -> Any:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"the model configuration lacks {key!r}")
    return value


def _integer(config: Json, key: str, default: int | None = None) -> int:
    value = _value(config, key, default)
    if type(value) is not int:
        raise ValueError(f"{key} must be an integer, not {value!r}")
    _require_positive(key, value)
    return value


def _number(config: Json, key: str, default: float | None = None) -> float:
    value = _value(config, key, default)
    if type(value) not in (int, float):
        raise ValueError(f"{key} must be a number, not {value!r}")
    return float(value)


def _flag(config: Json, key: str) -> bool:
    value = _value(config, key, False)
    if type(value) is not bool:
        raise ValueError(f"{key} must be true or false, not {value!r}")
    return value


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
