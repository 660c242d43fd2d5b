"""Products of test cases of which every run takes a part, and `make test-extended` the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def diagonal(
    first: Sequence[Any], second: Sequence[Any], name: Callable[[Any], str] = str
) -> list[ParameterSet]:
    """All pairs. Every run takes each value of both at least once, by going along a diagonal."""
    shorter = min(len(first), len(second))
    pairs = itertools.product(enumerate(first), enumerate(second))
    return [
        pytest.param(
            *(one, other),
            id=f"{name(one)}-{name(other)}",
            marks=() if (i + j) % shorter == 0 else (pytest.mark.extended,),
        )
        for (i, one), (j, other) in pairs
    ]
