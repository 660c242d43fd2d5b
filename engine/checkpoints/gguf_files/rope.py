"""Rope scaling as GGUF stores it: keys, or for Llama 3 one divisor per frequency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.checkpoints.config_values import integer
from engine.checkpoints.rope_scaling import (
    BETA_FAST,
    BETA_SLOW,
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    YarnRopeScaling,
    yarn_attention_factor,
)

ROPE_FREQS = "rope_freqs.weight"
# Every published Llama 3.1 to 3.3 uses these; the factor (8 or 32) shows in the divisors.
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_CONTEXT = 1.0, 4.0, 8192
TOLERANCE = 1e-3  # relative
PREFIX = "llama.rope.scaling."


def rope_scaling(
    metadata: Mapping[str, Any], divisors: list[float] | None, theta: float
) -> RopeScaling | None:
    """The scaling of a file. `divisors`: those in its tensor `ROPE_FREQS`, if it has one.
    ValueError for scalings that are not supported."""
    old_factor = metadata.get("llama.rope.scale_linear", 1.0)
    kind = metadata.get(PREFIX + "type", "none" if old_factor == 1.0 else "linear")
    factor = metadata.get(PREFIX + "factor", old_factor)
    if kind == "none":
        return None if divisors is None else llama3_scaling(divisors, theta)
    if kind not in ("linear", "yarn") or divisors is not None or factor < 1:
        with_divisors = f" with {ROPE_FREQS}" if divisors is not None else ""
        raise ValueError(
            f"rope scaling {kind!r} by {factor}{with_divisors} is not supported; "
            "'none', 'linear' and 'yarn' by at least 1 are"
        )
    served = integer(metadata, "llama.context_length")
    context = integer(metadata, PREFIX + "original_context_length", served)
    if kind == "linear":
        return LinearRopeScaling(factor, context)
    return _yarn(metadata, factor, context)


def _yarn(metadata: Mapping[str, Any], factor: float, context: int) -> YarnRopeScaling:
    """As llama.cpp computes it, which has no such key as `mscale`."""
    if metadata.get(PREFIX + "yarn_log_multiplier", 0.0):
        raise ValueError(f"{PREFIX}yarn_log_multiplier is not supported for Llama")
    if metadata.get(PREFIX + "yarn_ext_factor", 1.0) != 1.0:
        raise ValueError(f"{PREFIX}yarn_ext_factor other than 1 is not supported")
    more = math.prod(metadata.get(PREFIX + key, 1.0) for key in ("attn_factor", "yarn_attn_factor"))
    return YarnRopeScaling(
        factor=factor,
        original_max_position_embeddings=context,
        attention_factor=yarn_attention_factor(factor) * more,
        beta_fast=metadata.get(PREFIX + "yarn_beta_fast", BETA_FAST),
        beta_slow=metadata.get(PREFIX + "yarn_beta_slow", BETA_SLOW),
    )


def llama3_scaling(divisors: list[float], theta: float) -> Llama3RopeScaling:
    """The parameters that give these divisors [D / 2]. ValueError if Llama 3's do not."""
    scaling = Llama3RopeScaling(max(divisors), LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_CONTEXT)
    wanted = frequency_divisors(scaling, theta, len(divisors))
    for found, expected in zip(divisors, wanted, strict=True):
        if not math.isclose(found, expected, rel_tol=TOLERANCE):
            raise ValueError(
                f"{ROPE_FREQS} is not the Llama 3 scaling with {scaling}: "
                f"it holds {found:.6g} where that has {expected:.6g}"
            )
    return scaling


def frequency_divisors(scaling: Llama3RopeScaling, theta: float, count: int) -> list[float]:
    """The divisor of each of `count` rotary frequencies."""
    return [_divisor(scaling, theta ** (index / count)) for index in range(count)]


def _divisor(scaling: Llama3RopeScaling, inverse_frequency: float) -> float:
    turns = scaling.original_max_position_embeddings / (2 * math.pi * inverse_frequency)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = min(max((turns - low) / (high - low), 0.0), 1.0)
    return 1 / ((1 - keep) / scaling.factor + keep)
