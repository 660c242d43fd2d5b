"""How a model's weights are kept: as stored, as plain numbers, or quantised here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from configs.schema import WeightForm
from kernels.linear.grouped import GROUP, GroupedWeight, GroupLayout, dense, quantise, stacked
from kernels.ops import LinearWeight, Ops

BITS = {"q8": 8, "q4": 4}
Part = GroupedWeight | Tensor


@dataclass(frozen=True, slots=True)
class WeightPacker:
    """Packs weights in one form for one device.

    `stored` keeps what is quantised on disk so, if the kernels read it; `plain` keeps numbers of
    `dtype`; `q8` and `q4` quantise, if the inputs divide into groups.
    """

    ops: Ops
    dtype: torch.dtype
    device: torch.device
    form: WeightForm

    def pack(self, parts: Iterable[Part], num_rows: int, bias: Tensor | None) -> LinearWeight:
        """The rows of all parts, `num_rows` together, as one weight. Neighbours of one layout
        become one product."""
        if not self._keeps_groups:
            return self.ops.pack_linear(self._joined(parts, num_rows), bias)
        kept = [self._kept(part) for part in parts]
        if not all(isinstance(part, GroupedWeight) for part in kept):
            return self.ops.pack_linear(self._joined(kept, num_rows), bias)
        first, *more = self._packed(kept, bias)
        return replace(first, more=tuple(more)) if more else first

    def pack_experts(self, weights: Iterable[Tensor], count: int) -> tuple[LinearWeight, ...]:
        """The weights [in, out] of `count` experts, in the form that `ops.moe` reads."""
        if not self.ops.stacks_experts:
            return tuple(
                self.pack([weight.T.contiguous()], weight.shape[1], None) for weight in weights
            )
        stack = None
        for expert, weight in enumerate(weights):
            if stack is None:
                shape = (count, *weight.shape)
                stack = torch.empty(shape, dtype=self.dtype, device=self.device)
            stack[expert].copy_(weight)
        assert stack is not None
        inputs, outputs = stack.shape[1:]
        return (LinearWeight(stack, None, outputs, inputs),)

    @property
    def _keeps_groups(self) -> bool:
        return self.ops.reads_groups and self.form != "plain"

    def _joined(self, parts: Iterable[Part], num_rows: int) -> Tensor:
        """The plain rows of all parts. Holds one part at a time besides the result."""
        result, at = None, 0
        for part in parts:
            rows = dense(part)
            if result is None:
                shape = (num_rows, *rows.shape[1:])
                result = torch.empty(shape, dtype=self.dtype, device=self.device)
            result[at : at + len(rows)].copy_(rows)
            at += len(rows)
        assert result is not None
        assert at == num_rows, "fewer rows than the configuration says"
        return result

    def _kept(self, part: Part) -> Part:
        if self.form in BITS and part.shape[1] % GROUP == 0:
            return quantise(dense(part), BITS[self.form])
        return part

    def _packed(self, parts: Sequence[Part], bias: Tensor | None) -> Iterator[LinearWeight]:
        at = 0
        grouped = [part for part in parts if isinstance(part, GroupedWeight)]
        for _, same in groupby(grouped, key=_layout):
            weight = stacked(list(same))
            own = None if bias is None else bias[at : at + len(weight)]
            at += len(weight)
            yield self.ops.pack_linear(weight, own)


def _layout(part: GroupedWeight) -> GroupLayout:
    return part.layout


def with_zero_rows(part: Part, num_rows: int) -> Part:
    """`part` with rows of zeros after its own, `num_rows` in all."""
    if isinstance(part, Tensor):
        return _extended(part, num_rows)
    minimums = None if part.minimums is None else _extended(part.minimums, num_rows)
    codes, scales = _extended(part.codes, num_rows), _extended(part.scales, num_rows)
    return GroupedWeight(codes, scales, minimums, part.bits)


def _extended(rows: Tensor, num_rows: int) -> Tensor:
    missing = rows.new_zeros(num_rows - len(rows), *rows.shape[1:])
    return torch.cat((rows, missing)) if len(missing) else rows
