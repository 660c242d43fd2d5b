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
        stack: Stack | None = None
        for expert, stored in enumerate(weights):
            parts = [self._kept(part) for part in stored]
            if stack is None:
                stack = self._new_stack(parts, count)
            stack.put(expert, parts)
        assert stack is not None
        return (stack.weight(),)

    def _new_stack(self, parts: Sequence[Part], count: int) -> Stack:
        """Empty, for experts that are stored like this one."""
        outputs, inputs, first = sum(map(len, parts)), parts[0].shape[1], parts[0]
        if isinstance(first, Tensor) or any(type(part) is not type(first) for part in parts):
            shape = (count, inputs, outputs)
            return PlainStack(torch.empty(shape, dtype=self.dtype, device=self.device))
        if isinstance(first, ScaledWeight):
            return ScaledStack.empty(first, count, outputs, self.device)
        return GroupedStack.empty(first, count, outputs, self.device)

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
                raise _unlike(expert)
            self.data[expert, at : at + len(part)].copy_(part.values)
            self.scales[expert, at : at + len(part)].copy_(part.scales)
            at += len(part)

    def weight(self) -> LinearWeight:
        outputs, inputs = self.data.shape[1:]
        return LinearWeight(self.data, None, outputs, inputs, self.layout, self.scales)


@dataclass(slots=True)
class GroupedStack:
    """The weights of all experts as codes of four bits. Scales are float32, and there are minimums,
    as soon as one expert has such."""

    pairs: Tensor  # [E, out, in / 2] uint8, see `GroupedWeight.pairs`
    scales: Tensor  # [E, out, groups]
    minimums: Tensor | None
    group: int

    @classmethod
    def empty(
        cls, like: GroupedWeight, count: int, outputs: int, device: torch.device
    ) -> GroupedStack:
        inputs, group = like.shape[1], like.layout.group
        pairs = torch.empty(count, outputs, inputs // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(count, outputs, inputs // group, dtype=torch.float16, device=device)
        return cls(pairs, scales, None, group)

    def put(self, expert: int, parts: Sequence[Part]) -> None:
        """ValueError for an expert that is not stored like the first one."""
        at = 0
        for part in parts:
            if not isinstance(part, GroupedWeight) or part.layout[:2] != (4, self.group):
                raise _unlike(expert)
            place = (slice(expert, expert + 1), slice(at, at + len(part)))
            self._take(part.to(self.pairs.device), place)  # packed there, which takes long on a CPU
            at += len(part)

    def _take(self, part: GroupedWeight, place: tuple[slice, slice]) -> None:
        if part.layout.wide_scales and self.scales.dtype is not torch.float32:
            self.scales = self.scales.float()
            self.minimums = None if self.minimums is None else self.minimums.float()
        if part.minimums is not None and self.minimums is None:
            self.minimums = self.scales * -part.middle
        if self.minimums is not None:
            part = part.with_minimums()
            assert part.minimums is not None
            self.minimums[place].copy_(part.minimums)
        self.pairs[place].copy_(part.pairs)
        self.scales[place].copy_(part.scales)

    def weight(self) -> LinearWeight:
        outputs, inputs = self.pairs.shape[1], 2 * self.pairs.shape[2]
        wide = self.scales.dtype is torch.float32
        layout = GroupLayout(4, self.group, wide, self.minimums is not None)
        return LinearWeight(self.pairs, None, outputs, inputs, layout, self.scales, self.minimums)


def _unlike(expert: int) -> ValueError:
    return ValueError(f"those of expert {expert} are not stored as those of the experts before it")


Stack = PlainStack | ScaledStack | GroupedStack


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
