"""How a model stretches its rotary frequencies for long contexts, as config.json says it. Imports
no torch; `engine.models.rope` computes the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.checkpoints.config_values import Json, flag, integer, number

DEFAULT_ROPE_THETA = 10000.0
PLAIN_ROPE = (None, "none", "default")
TYPE = "rope_type"
KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
BETA_FAST, BETA_SLOW = 32.0, 1.0  # turns over the original context, as in the paper
COMMON_KEYS = {TYPE, "type", "rope_theta", "partial_rotary_factor"}
HARMLESS_KEYS = {"finetuned"}  # says how the model was trained
YARN_KEYS = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast"}
YARN_KEYS |= {"beta_slow", "mscale", "mscale_all_dim", "truncate"}
LLAMA3_KEYS = {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}


class LinearRopeScaling(msgspec.Struct, frozen=True, tag_field=TYPE, tag="linear"):
    """All frequencies divided by `factor`."""

    factor: float
    original_max_position_embeddings: int  # positions, as everywhere below


class DynamicRopeScaling(msgspec.Struct, frozen=True, tag_field=TYPE, tag="dynamic"):
    """A larger base for sequences longer than the original context (NTK-aware scaling)."""

    factor: float
    original_max_position_embeddings: int


class YarnRopeScaling(msgspec.Struct, frozen=True, tag_field=TYPE, tag="yarn"):
    """Low frequencies divided by `factor`, high ones kept; rotated vectors are multiplied by
    `attention_factor` (arXiv:2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = BETA_FAST
    beta_slow: float = BETA_SLOW
    truncate: bool = True  # round the range of blended dimensions to whole ones


class Llama3RopeScaling(msgspec.Struct, frozen=True, tag_field=TYPE, tag="llama3"):
    """Frequency scaling of Llama 3.1 and later."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


RopeScaling = LinearRopeScaling | DynamicRopeScaling | YarnRopeScaling | Llama3RopeScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embeddings, and the positions that they serve."""

    theta: float
    scaling: RopeScaling | None
    max_positions: int


def read_rope(config: Json) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_scaling` (older). ValueError for what would
    need other arithmetic.

    `linear` and `dynamic` serve `factor` times max_position_embeddings, which means the original
    context there; with the others it includes the scaling.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope parameters must be a table, not {rope!r}")
    theta = number(rope, "rope_theta", number(config, "rope_theta", DEFAULT_ROPE_THETA))
    for table in (rope, config):
        if table.get("partial_rotary_factor") not in (None, 1, 1.0):
            factor = table["partial_rotary_factor"]
            raise ValueError(f"partial_rotary_factor {factor} is not supported; 1.0 is")
    scaling = _scaling(rope, config)
    positions = integer(config, "max_position_embeddings", 2048)
    if isinstance(scaling, LinearRopeScaling | DynamicRopeScaling):
        positions = int(positions * scaling.factor)
    return Rope(theta, scaling, positions)


def rope_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The table of a config.json; `read_rope` reads it back."""
    table: dict[str, Any] | None = msgspec.to_builtins(scaling)
    return table


def json_positions(scaling: RopeScaling | None, max_positions: int) -> int:
    """The max_position_embeddings of a config.json."""
    if isinstance(scaling, LinearRopeScaling | DynamicRopeScaling):
        return scaling.original_max_position_embeddings
    return max_positions


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """The factor that the paper gives for a context stretched by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _scaling(rope: Json, config: Json) -> RopeScaling | None:
    kind = rope.get(TYPE, rope.get("type"))
    original = integer(config, "max_position_embeddings", 2048)
    if kind in PLAIN_ROPE:
        _check_keys(rope, set())
        return None
    if kind in ("linear", "dynamic"):
        _check_keys(rope, {"factor", "original_max_position_embeddings"})
        if kind == "linear":
            return LinearRopeScaling(_factor(rope), original)
        if integer(rope, "original_max_position_embeddings", original) != original:
            raise ValueError(
                "rope type 'dynamic' starts from max_position_embeddings "
                f"{original}; original_max_position_embeddings must be absent or the same: {rope}"
            )
        return DynamicRopeScaling(_factor(rope), original)
    if kind not in ("yarn", "llama3"):
        raise ValueError(f"rope type {kind!r} is not supported; {', '.join(KINDS)} are")
    # transformers prefers the key outside of the table
    original = integer(rope, "original_max_position_embeddings", original)
    original = integer(config, "original_max_position_embeddings", original)
    return _yarn(rope, config, original) if kind == "yarn" else _llama3(rope, original)


def _check_keys(rope: Json, known: set[str]) -> None:
    unknown = sorted(set(rope) - known - COMMON_KEYS - HARMLESS_KEYS)
    given = [name for name in unknown if rope[name] is not None]
    if given:
        raise ValueError(
            f"rope parameters of type {rope.get('rope_type', rope.get('type'))!r} have "
            f"{', '.join(given)}, which is not supported"
        )


def _factor(rope: Json, default: float | None = None) -> float:
    factor = number(rope, "factor", default)
    if factor < 1:
        raise ValueError(f"factor of rope scaling must be at least 1, not {factor}")
    return factor


def _yarn(rope: Json, config: Json, original: int) -> YarnRopeScaling:
    _check_keys(rope, YARN_KEYS)
    positions = integer(config, "max_position_embeddings", 2048)
    factor = _factor(rope, positions / original)
    mscale, all_dim = number(rope, "mscale", 0.0), number(rope, "mscale_all_dim", 0.0)
    usual = yarn_attention_factor(factor)
    if mscale and all_dim:
        above = yarn_attention_factor(factor, mscale)
        usual = above / yarn_attention_factor(factor, all_dim)
    scaling = YarnRopeScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=number(rope, "attention_factor", usual),
        beta_fast=number(rope, "beta_fast", BETA_FAST) or BETA_FAST,
        beta_slow=number(rope, "beta_slow", BETA_SLOW) or BETA_SLOW,
        truncate=flag(rope, "truncate", True),
    )
    if scaling.beta_fast < scaling.beta_slow or scaling.attention_factor <= 0:
        raise ValueError(f"yarn rope needs beta_fast >= beta_slow and attention_factor > 0: {rope}")
    return scaling


def _llama3(rope: Json, original: int) -> Llama3RopeScaling:
    _check_keys(rope, LLAMA3_KEYS)
    scaling = Llama3RopeScaling(
        factor=number(rope, "factor"),
        low_freq_factor=number(rope, "low_freq_factor"),
        high_freq_factor=number(rope, "high_freq_factor"),
        original_max_position_embeddings=original,
    )
    if scaling.low_freq_factor > scaling.high_freq_factor or scaling.factor < 1:
        raise ValueError(f"llama3 rope needs low <= high frequency factors and factor >= 1: {rope}")
    return scaling
