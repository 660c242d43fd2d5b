"""Weights kept as 8-bit floating-point numbers with scales, before a backend packs them.

    weight[n, k] = scales[n, k // block] * values[n, k]

A scale for the whole weight, or for each output, is one block over all inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.linear.grouped import Index

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of FP8


class ScaledLayout(NamedTuple):
    """What the kernels need to know to multiply with 8-bit floating-point numbers."""

    block: int  # inputs per scale
    rounds_inputs: bool  # to the same numbers, with a scale for each row and block
    input_bound: float | None  # larger inputs are cut off before they are rounded

    @property
    def form(self) -> str:
        """What `Ops.reads` calls such weights."""
        return "fp8"


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A weight [N, K] with scales. Indexing takes rows, and columns in whole blocks."""

    values: Tensor  # [N, K] float8_e4m3fn
    scales: Tensor  # [N, ceil(K / block)] float32
    layout: ScaledLayout

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Index) -> ScaledWeight | Tensor:
        """The indexed part; plain float32 numbers if columns are cut within a block."""
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        width, block = self.shape[1], self.layout.block
        start, stop, _ = columns.indices(width)
        if self.scales.shape[1] == 1:
            kept = self.values[rows, start:stop]
            layout = self.layout._replace(block=kept.shape[1])
            return ScaledWeight(kept, self.scales[rows], layout)
        if start % block or (stop % block and stop < width):
            return self.dequantised()[rows, columns]
        blocks = slice(start // block, -(-stop // block))
        return ScaledWeight(self.values[rows, start:stop], self.scales[rows, blocks], self.layout)

    def to(self, device: torch.device) -> ScaledWeight:
        return ScaledWeight(self.values.to(device), self.scales.to(device), self.layout)

    def take(self, rows: Tensor) -> ScaledWeight:
        """The rows with these numbers, [N] int64, in this order."""
        return ScaledWeight(self.values[rows], self.scales[rows], self.layout)

    def padded(self, num_rows: int) -> ScaledWeight:
        """With rows of zeros after its own, `num_rows` in all."""
        missing = num_rows - len(self)
        values = torch.cat((self.values, self.values.new_zeros(missing, self.shape[1])))
        scales = torch.cat((self.scales, self.scales.new_zeros(missing, self.scales.shape[1])))
        return ScaledWeight(values, scales, self.layout)

    def dequantised(self) -> Tensor:
        """[N, K] float32."""
        scales = self.scales.repeat_interleave(self.layout.block, dim=1)[:, : self.shape[1]]
        return self.values.float() * scales

    @staticmethod
    def stacked(parts: Sequence[ScaledWeight]) -> ScaledWeight:
        """The rows of all parts, which have one layout."""
        values, scales = (torch.cat(each) for each in zip(*map(_tensors, parts), strict=True))
        return ScaledWeight(values, scales, parts[0].layout)


def _tensors(part: ScaledWeight) -> tuple[Tensor, Tensor]:
    return part.values, part.scales
