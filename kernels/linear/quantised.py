"""All forms in which a weight may reach a backend."""

from __future__ import annotations

from torch import Tensor

from kernels.linear.grouped import GroupedWeight
from kernels.linear.scaled import ScaledWeight

Quantised = GroupedWeight | ScaledWeight
Part = Quantised | Tensor


def dense(part: Part) -> Tensor:
    """The numbers of a part, whether quantised or not."""
    return part if isinstance(part, Tensor) else part.dequantised()
