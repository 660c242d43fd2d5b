"""Llama 3 rope scaling as GGUF stores it: one divisor per frequency, not parameters."""

from __future__ import annotations

import math

from engine.checkpoints.rope_scaling import Llama3RopeScaling

ROPE_FREQS = "rope_freqs.weight"
# Every published Llama 3.1 to 3.3 uses these; the factor (8 or 32) shows in the divisors.
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_CONTEXT = 1.0, 4.0, 8192
TOLERANCE = 1e-3  # relative


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
