"""Rounds the weight of a linear layer to FP8 or to four bits.

The columns of a weight are rounded one after the other, those of the largest inputs first, and what
rounding one adds to the outputs is taken off by those still to come (GPTQ, arXiv:2210.17323).
Scales are chosen before, so that inputs keep their order and their groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.linear.scaled import FP8, LARGEST

BLOCK = 128  # columns between updates of all later ones
DAMPING = 0.01  # of the mean input, added to each: keeps the system solvable
LEAST, HIGHEST = -8, 7  # codes of four bits
CLIPPED = 0.6  # the smallest scale that is tried, as a share of the one that cuts nothing off
STEPS = 13  # scales that are tried


class Grid(Protocol):
    """Numbers code * scale."""

    def scales(self, weight: Tensor, importance: Tensor) -> Tensor:
        """[N, groups], for a weight [N, K] whose inputs have these mean squares [K]."""
        ...

    def codes(self, values: Tensor, scales: Tensor) -> Tensor:
        """The nearest codes, as float32; both broadcast against each other."""
        ...


@dataclass(frozen=True, slots=True)
class Float8:
    """FP8 (e4m3) with a scale for each output."""

    dtype: torch.dtype  # of scales

    def scales(self, weight: Tensor, importance: Tensor) -> Tensor:  # noqa: ARG002
        return _positive(weight.abs().amax(dim=1, keepdim=True) / LARGEST, self.dtype)

    def codes(self, values: Tensor, scales: Tensor) -> Tensor:
        return (values / scales).clamp(-LARGEST, LARGEST).to(FP8).float()


@dataclass(frozen=True, slots=True)
class FourBits:
    """Four bits, symmetric, with a scale for each output and `group` inputs."""

    group: int
    dtype: torch.dtype

    def scales(self, weight: Tensor, importance: Tensor) -> Tensor:
        """Those that change the outputs least, if inputs were independent of each other."""
        groups = weight.view(len(weight), -1, self.group)  # [N, G, group]
        weights = importance.view(-1, self.group)
        widest = groups.abs().amax(dim=2) / HIGHEST
        best = _positive(widest, self.dtype)
        least = torch.full_like(best, torch.inf)
        for share in torch.linspace(1.0, CLIPPED, STEPS).tolist():
            tried = _positive(widest * share, self.dtype)
            rounded = self.codes(groups, tried[..., None]) * tried[..., None]
            error = ((groups - rounded).square() * weights).sum(dim=2)
            better = error < least
            best, least = torch.where(better, tried, best), torch.where(better, error, least)
        return best

    def codes(self, values: Tensor, scales: Tensor) -> Tensor:
        return (values / scales).round().clamp(LEAST, HIGHEST)


def _positive(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As `dtype` holds them. Zeros get any scale."""
    return scales.to(dtype).float().clamp_min(torch.finfo(torch.float16).tiny)


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight [N, K] in codes."""

    codes: Tensor  # [N, K] float32, whole or FP8 numbers
    scales: Tensor  # [N, groups] float32

    @property
    def numbers(self) -> Tensor:
        """[N, K], what the codes mean."""
        return self.codes * _wide(self.scales, self.codes.shape[1])

    def split(self, rows: Sequence[int]) -> list[Rounded]:
        """Pieces of so many rows each."""
        parts = zip(
            *(torch.split(each, list(rows)) for each in (self.codes, self.scales)), strict=True
        )
        return [Rounded(codes, scales) for codes, scales in parts]


def _wide(scales: Tensor, num_inputs: int) -> Tensor:
    """[N, K], of every input."""
    return scales.repeat_interleave(num_inputs // scales.shape[1], dim=1)


def round_to_nearest(weight: Tensor, grid: Grid) -> Rounded:
    """Every number of a weight [N, K] for itself."""
    scales = grid.scales(weight, torch.ones_like(weight[0]))
    return Rounded(grid.codes(weight, _wide(scales, weight.shape[1])), scales)


def round_for_inputs(weight: Tensor, inputs: Tensor, grid: Grid) -> Rounded:
    """A weight [N, K] float32, for inputs x [T, K] with `inputs` = x^T x."""
    scales = grid.scales(weight, inputs.diagonal())
    order = inputs.diagonal().argsort(descending=True, stable=True)
    rest, own = weight[:, order], _wide(scales, weight.shape[1])[:, order]
    spread = _spread(inputs[order][:, order])
    codes = torch.empty_like(weight)
    for first in range(0, weight.shape[1], BLOCK):
        block = slice(first, first + BLOCK)
        part = spread[block, block]
        codes[:, order[block]], errors = _round_block(rest[:, block], own[:, block], part, grid)
        rest[:, block.stop :] -= errors @ spread[block, block.stop :]
    return Rounded(codes, scales)


def _round_block(
    values: Tensor, scales: Tensor, spread: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Codes of some columns, and the errors that later ones take off. Changes `values`."""
    codes, errors = torch.empty_like(values), torch.empty_like(values)
    for column in range(values.shape[1]):
        codes[:, column] = grid.codes(values[:, column], scales[:, column])
        rounded = codes[:, column] * scales[:, column]
        errors[:, column] = (values[:, column] - rounded) / spread[column, column]
        later = slice(column + 1, None)
        values[:, later] -= errors[:, column, None] * spread[column, later]
    return codes, errors


def _spread(inputs: Tensor) -> Tensor:
    """[K, K] upper triangle: row k says how an error in column k is shared out among later ones. It
    is the Cholesky factor of the inverse of x^T x."""
    mean = inputs.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped = inputs.double() / mean
    damped.diagonal().add_(DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
