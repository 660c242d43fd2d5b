"""FP8 weights of safetensors files, read in part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoints.arch import Shape
from engine.checkpoints.quantised.config import Scheme
from engine.checkpoints.stored import FLOATS, Bounds, Index, View, bounds
from kernels.linear.scaled import ScaledLayout, ScaledWeight

FP8_DTYPE = "F8_E4M3"  # as safetensors call it
SCALE_NAMES = ("weight_scale", "weight_scale_inv")  # both are factors of the stored numbers


@dataclass(frozen=True, slots=True)
class StoredScaled:
    """A weight [N, K] as FP8 numbers, with one scale, one for each output, or one for each block
    (implements `Stored`)."""

    values: View  # [N, K]
    scales: View
    scheme: Scheme

    @property
    def shape(self) -> Shape:
        return tuple(self.values.get_shape())

    def __getitem__(self, index: Index, /) -> ScaledWeight | Tensor:
        """Plain numbers if columns are cut within a block."""
        rows, columns = bounds(index, self.shape)
        if self.scheme.block is not None:
            return self._blocks(rows)[:, slice(*columns)]
        values = torch.as_tensor(self.values[slice(*rows), slice(*columns)])
        scales = torch.as_tensor(self.scales[...]).float().reshape(-1, 1)
        own = scales[slice(*rows)] if len(scales) > 1 else scales.expand(len(values), 1)
        return ScaledWeight(values, own.contiguous(), self._layout(values.shape[1]))

    def _blocks(self, rows: Bounds) -> ScaledWeight:
        assert self.scheme.block is not None
        height, width = self.scheme.block
        first = rows[0] // height
        scales = torch.as_tensor(self.scales[first : -(-rows[1] // height)]).float()
        every = scales.repeat_interleave(height, dim=0)
        own = every[rows[0] - first * height : rows[1] - first * height]
        values = torch.as_tensor(self.values[slice(*rows)])
        return ScaledWeight(values, own.contiguous(), self._layout(width))

    def _layout(self, block: int) -> ScaledLayout:
        return ScaledLayout(block, self.scheme.rounds_inputs, self.scheme.input_bound)

    def check(self, name: str) -> None:
        """ValueError if the scales are not of the number that the scheme says."""
        N, K = self.shape
        found = tuple(self.scales.get_shape())
        allowed = self._scale_shapes(N, K)
        if found not in allowed or self.scales.get_dtype() not in FLOATS:
            raise ValueError(
                f"tensor {name} is {self.scales.get_dtype()} of shape {list(found)}; "
                f"{self.scheme.strategy} scales of a weight {[N, K]} are {', '.join(FLOATS)} of "
                f"shape {' or '.join(str(list(shape)) for shape in allowed)}"
            )

    def _scale_shapes(self, N: int, K: int) -> tuple[Shape, ...]:
        if self.scheme.block is not None:
            height, width = self.scheme.block
            return ((-(-N // height), -(-K // width)),)
        return ((), (1,), (1, 1)) if self.scheme.strategy == "tensor" else ((N, 1), (N,))


@dataclass(frozen=True, slots=True)
class ExpertOf:
    """A part of a tensor of all experts, [E, in, out], as a view [out, in] (implements `View`)."""

    every: View
    expert: int
    outputs: Bounds

    def get_shape(self) -> list[int]:
        return [self.outputs[1] - self.outputs[0], self.every.get_shape()[1]]

    def get_dtype(self) -> str:
        return self.every.get_dtype()

    def __getitem__(self, index: Index, /) -> Tensor:
        rows, columns = bounds(index, self.get_shape())
        outputs = slice(self.outputs[0] + rows[0], self.outputs[0] + rows[1])
        own = slice(self.expert, self.expert + 1)
        return torch.as_tensor(self.every[own, slice(*columns), outputs])[0].T


@dataclass(frozen=True, slots=True)
class ScalesOf:
    """The scales [out, 1] of that part (implements `View`). They are stored as [E, 1, out], or for
    the second product as [E, out, 1]."""

    every: View
    expert: int
    outputs: Bounds

    def get_shape(self) -> list[int]:
        return [self.outputs[1] - self.outputs[0], 1]

    def get_dtype(self) -> str:
        return self.every.get_dtype()

    def __getitem__(self, index: object, /) -> Tensor:
        assert index is Ellipsis
        scales = torch.as_tensor(self.every[self.expert : self.expert + 1])
        return scales.reshape(-1, 1)[slice(*self.outputs)]
