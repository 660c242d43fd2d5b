"""Weights quantised in groups of inputs, before a backend packs them.

    weight[n, k] = scales[n, g] * (codes[n, k] - zero) + minimums[n, g]      g = k // group

Codes have four or eight bits. Without minimums `zero` is the middle of their range. Special cases
are the formats of GGUF files, GPTQ, AWQ and compressed-tensors, and our own quantisation of loaded
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32  # inputs per scale, where we choose
Index = slice | tuple[slice, ...]


class GroupLayout(NamedTuple):
    """What the kernels need to know to read packed groups."""

    bits: int  # of a code: 4 or 8
    group: int  # inputs per scale: 16 or a multiple of 32
    wide_scales: bool  # scales are float32, not float16
    has_minimums: bool

    @property
    def form(self) -> str:
        """What `Ops.reads` calls such weights."""
        return f"q{self.bits}"


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """A weight [N, K] as codes with scales. Indexing takes rows, and columns in whole groups."""

    codes: Tensor  # [N, K] uint8
    scales: Tensor  # [N, K / group] float16 or float32
    minimums: Tensor | None  # the same, or None
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def layout(self) -> GroupLayout:
        group = self.codes.shape[1] // self.scales.shape[1]
        wide = self.scales.dtype is torch.float32
        return GroupLayout(self.bits, group, wide, self.minimums is not None)

    @property
    def middle(self) -> int:
        """The code that stands for zero where there are no minimums."""
        return 1 << (self.bits - 1)

    @property
    def zero(self) -> int:
        """What is taken off a code before it is scaled."""
        return self.middle if self.minimums is None else 0

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: Index) -> GroupedWeight | Tensor:
        """The indexed part; plain float32 numbers if columns are cut within a group."""
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        start, stop, _ = columns.indices(self.shape[1])
        group = self.layout.group
        if start % group or stop % group:
            return self.dequantised()[rows, columns]
        groups = slice(start // group, stop // group)
        minimums = None if self.minimums is None else self.minimums[rows, groups]
        return GroupedWeight(
            self.codes[rows, start:stop], self.scales[rows, groups], minimums, self.bits
        )

    @property
    def pairs(self) -> Tensor:
        """[N, K / 2] uint8: two codes of four bits to a byte, the first one in the lower half. K is
        even, as indexing takes whole groups."""
        assert self.bits == 4
        return self.codes[:, 0::2] | self.codes[:, 1::2] << 4

    def to(self, device: torch.device) -> GroupedWeight:
        minimums = None if self.minimums is None else self.minimums.to(device)
        return GroupedWeight(self.codes.to(device), self.scales.to(device), minimums, self.bits)

    def take(self, rows: Tensor) -> GroupedWeight:
        """The rows with these numbers, [N] int64, in this order."""
        minimums = None if self.minimums is None else self.minimums[rows]
        return GroupedWeight(self.codes[rows], self.scales[rows], minimums, self.bits)

    def padded(self, num_rows: int) -> GroupedWeight:
        """With rows of zeros after its own, `num_rows` in all."""

        def extended(rows: Tensor) -> Tensor:
            return torch.cat((rows, rows.new_zeros(num_rows - len(rows), rows.shape[1])))

        minimums = None if self.minimums is None else extended(self.minimums)
        return GroupedWeight(extended(self.codes), extended(self.scales), minimums, self.bits)

    def regrouped(self, most: int) -> GroupedWeight:
        """The same numbers in groups of at most `most` inputs, which must divide larger ones."""
        copies = self.layout.group // most
        if copies <= 1:
            return self
        scales = self.scales.repeat_interleave(copies, dim=1)
        wide = self.minimums
        minimums = None if wide is None else wide.repeat_interleave(copies, dim=1)
        return GroupedWeight(self.codes, scales, minimums, self.bits)

    def with_minimums(self) -> GroupedWeight:
        """The same numbers, with the code of zero as minimums."""
        if self.minimums is not None:
            return self
        return GroupedWeight(self.codes, self.scales, self.scales * -self.zero, self.bits)

    def dequantised(self) -> Tensor:
        """[N, K] float32."""
        rows, groups = self.scales.shape
        values = self.codes.reshape(rows, groups, -1).float() - self.zero
        values *= self.scales.float().unsqueeze(-1)
        if self.minimums is not None:
            values += self.minimums.float().unsqueeze(-1)
        return values.reshape(rows, -1)

    @staticmethod
    def stacked(parts: Sequence[GroupedWeight]) -> GroupedWeight:
        """The rows of all parts, which have one layout."""
        first, minimums = parts[0], [part.minimums for part in parts if part.minimums is not None]
        return GroupedWeight(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(minimums) if minimums else None,
            first.bits,
        )


def quantise(weight: Tensor, bits: int) -> GroupedWeight:
    """Round a weight [N, K] to codes of 8 bits without minimums or of 4 bits with minimums, as the
    formats Q8_0 and Q4_1 do. ValueError if K does not divide into groups of 32."""
    if weight.shape[1] % GROUP:
        raise ValueError(f"{weight.shape[1]} inputs do not divide into groups of {GROUP}")
    groups = weight.float().reshape(len(weight), -1, GROUP)
    if bits == 8:
        scales = (groups.abs().amax(-1) / 127).half()
        codes = (groups / _divisor(scales)).round().clamp(-127, 127) + 128
        return GroupedWeight(codes.reshape(weight.shape).byte(), scales, None, 8)
    minimums = groups.amin(-1).half()
    scales = ((groups.amax(-1) - minimums.float()) / 15).half()
    codes = ((groups - minimums.float().unsqueeze(-1)) / _divisor(scales)).round().clamp(0, 15)
    return GroupedWeight(codes.reshape(weight.shape).byte(), scales, minimums, 4)


def _divisor(scales: Tensor) -> Tensor:
    """Scales to divide by, 1 where they are zero; [N, groups, 1] float32."""
    wide = scales.float()
    return torch.where(wide == 0, 1.0, wide).unsqueeze(-1)
