"""Statistics of several engines as those of one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from engine.messages import EngineStats


def total(parts: Sequence[EngineStats]) -> EngineStats | None:
    """Counts of several engines added up; of shares, the largest. None of no engine."""
    if not parts:
        return None
    found = {
        name: _together([getattr(part, name) for part in parts])
        for name in EngineStats.__struct_fields__
    }
    return EngineStats(**found)


def _together(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, bool):
        return any(values)
    if isinstance(first, float):
        return max(values)
    if isinstance(first, tuple):
        return tuple(map(sum, itertools.zip_longest(*values, fillvalue=0)))
    if isinstance(first, dict):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: sum(value.get(name, 0) for value in values) for name in names}
    return sum(values)
