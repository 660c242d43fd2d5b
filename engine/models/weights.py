"""How a model's weights are kept: as stored, as plain numbers, or quantised here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from configs.schema import WeightForm
from kernels.linear.grouped import GROUP, GroupedWeight, GroupLayout, quantise
from kernels.linear.quantised import Part, Quantised, dense
from kernels.linear.scaled import ScaledLayout, ScaledWeight
from kernels.ops import LinearWeight, Ops

BITS = {"q8": 8, "q4": 4}


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
        if self.form == "plain" or not self.ops.reads:
            return self.ops.pack_linear(self._joined(parts, num_rows), bias)
        kept = [self._kept(part) for part in parts]
        quantised = [part for part in kept if not isinstance(part, Tensor)]
        if len(quantised) < len(kept):
            return self.ops.pack_linear(self._joined(kept, num_rows), bias)
        first, *more = self._packed(quantised, bias)
        return replace(first, more=tuple(more)) if more else first

    def pack_experts(
        self, weights: Iterable[Sequence[Part]], count: int
    ) -> tuple[LinearWeight, ...]:
        """The weights of `count` experts, in the form that `ops.moe` reads. Each is given as parts
        [out, in] whose outputs follow each other."""
        if not self.ops.stacks_experts:
            return tuple(self.pack(parts, sum(map(len, parts)), None) for parts in weights)
        stack: PlainStack | ScaledStack | None = None
        for expert, parts in enumerate(weights):
            if stack is None:
                stack = self._new_stack(parts, count)
            stack.put(expert, parts)
        assert stack is not None
        return (stack.weight(),)

    def _new_stack(self, parts: Sequence[Part], count: int) -> PlainStack | ScaledStack:
        """Empty, for experts that are stored like this one."""
        outputs, inputs = sum(map(len, parts)), parts[0].shape[1]
        scaled = [part for part in parts if isinstance(part, ScaledWeight)]
        if len(scaled) == len(parts) and all(map(self._is_kept, parts)):
            return ScaledStack.empty(scaled[0], count, outputs, self.device)
        shape = (count, inputs, outputs)
        return PlainStack(torch.empty(shape, dtype=self.dtype, device=self.device))

    def _is_kept(self, part: Part) -> bool:
        """Whether the kernels read it as it is stored."""
        if isinstance(part, Tensor) or self.form == "plain":
            return False
        return part.layout.form in self.ops.reads

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
        return part if self._is_kept(part) else dense(part)

    def _packed(self, parts: Sequence[Quantised], bias: Tensor | None) -> Iterator[LinearWeight]:
        at = 0
        for _, same in groupby(parts, key=_layout):
            weight = stacked(list(same))
            own = None if bias is None else bias[at : at + len(weight)]
            at += len(weight)
            yield self.ops.pack_linear(weight.to(self.device), own)


@dataclass(frozen=True, slots=True)
class PlainStack:
    """The weights of all experts as plain numbers."""

    data: Tensor  # [E, in, out]

    def put(self, expert: int, parts: Sequence[Part]) -> None:
        at = 0
        for part in parts:
            self.data[expert, :, at : at + len(part)].copy_(dense(part).T)
            at += len(part)

    def weight(self) -> LinearWeight:
        inputs, outputs = self.data.shape[1:]
        return LinearWeight(self.data, None, outputs, inputs)


@dataclass(frozen=True, slots=True)
class ScaledStack:
    """The weights of all experts as 8-bit floating-point numbers."""

    data: Tensor  # [E, out, in]
    scales: Tensor  # [E, out, blocks] float32
    layout: ScaledLayout

    @classmethod
    def empty(
        cls, like: ScaledWeight, count: int, outputs: int, device: torch.device
    ) -> ScaledStack:
        data, scales = (
            torch.empty(count, outputs, each.shape[1], dtype=each.dtype, device=device)
            for each in (like.values, like.scales)
        )
        return cls(data, scales, like.layout)

    def put(self, expert: int, parts: Sequence[Part]) -> None:
        """ValueError for an expert that is not stored like the first one."""
        at = 0
        for part in parts:
            if not isinstance(part, ScaledWeight) or part.layout != self.layout:
                raise ValueError(f"expert {expert} is not stored as the experts before it are")
            self.data[expert, at : at + len(part)].copy_(part.values)
            self.scales[expert, at : at + len(part)].copy_(part.scales)
            at += len(part)

    def weight(self) -> LinearWeight:
        outputs, inputs = self.data.shape[1:]
        return LinearWeight(self.data, None, outputs, inputs, self.layout, self.scales)


def _layout(part: Quantised) -> GroupLayout | ScaledLayout:
    return part.layout


def stacked(parts: Sequence[Quantised]) -> Quantised:
    """The rows of all parts, which have one layout."""
    groups = [part for part in parts if isinstance(part, GroupedWeight)]
    if groups:
        return GroupedWeight.stacked(groups)
    return ScaledWeight.stacked([part for part in parts if isinstance(part, ScaledWeight)])


def with_zero_rows(part: Part, num_rows: int) -> Part:
    """`part` with rows of zeros after its own, `num_rows` in all."""
    if not isinstance(part, Tensor):
        return part.padded(num_rows)
    missing = part.new_zeros(num_rows - len(part), *part.shape[1:])
    return torch.cat((part, missing)) if len(missing) else part
