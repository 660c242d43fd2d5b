"""The products of a model, whose kernels `Ops.products` chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from engine.models.layers import GatedMLP, VocabParallelEmbedding
from kernels.ops import ExpertWeights, LinearWeight


def products(*parts: Any) -> Iterator[tuple[LinearWeight, bool]]:
    """Every weight that tokens are multiplied with, in (nested) dataclasses and tuples, and whether
    it is gated. Not those of experts, nor an embedding of its own."""
    for part in parts:
        if isinstance(part, LinearWeight):
            yield part, False
        elif isinstance(part, GatedMLP):
            yield part.gate_up.weight, True
            yield part.down.weight, False
        elif isinstance(part, tuple):
            yield from products(*part)
        elif dataclasses.is_dataclass(part) and not isinstance(
            part, (VocabParallelEmbedding, ExpertWeights)
        ):
            yield from products(*(getattr(part, field.name) for field in dataclasses.fields(part)))
