"""How many engines the load needs."""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext


class EnginesForLoad:
    """A policy of Ray Serve's autoscaler, which applies delays and limits afterwards."""

    def __init__(self, waiting_target: float, use_target: float) -> None:
        self._waiting_target = waiting_target
        self._use_target = use_target

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """How many engines there should be, and no state. As many as now while none has told its
        load, which a busy machine may delay."""
        found = context.aggregated_metrics or {}
        waiting = sum(found.get("waiting", {}).values())
        used = list(found.get("used", {}).values())
        if not used:
            return context.target_num_replicas, {}
        current = context.current_num_replicas
        return num_engines(current, waiting, used, self._waiting_target, self._use_target), {}


def num_engines(
    current: int, waiting: float, used: list[float], waiting_target: float, use_target: float
) -> int:
    """So many that `use_target` of their blocks and rows would be in use, and one more for every
    `waiting_target` requests that wait. `used`: shares of the engines that told theirs."""
    mean = sum(used) / len(used)
    return max(1, math.ceil(current * mean / use_target + waiting / waiting_target - 1e-9))
