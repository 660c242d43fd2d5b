"""Bundles go to the device and come back unchanged, in one copy each way."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.copies import ALIGNMENT, download, join, pack, upload
from tests.support.machine.pretend_device import DEVICE, PretendDevice


@dataclass(frozen=True)
class Part:
    ids: Tensor
    flags: Tensor
    name: str = "part"


@dataclass(frozen=True)
class Whole:
    part: Part
    rest: tuple[Tensor, int, None]


def whole() -> Whole:
    """Odd sizes, non-contiguous strides, one element with a stride, an empty tensor."""
    table = torch.arange(35, dtype=torch.int32).view(5, 7)
    numbers = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    part = Part(ids=torch.arange(3), flags=torch.tensor([True, False, True, True, False]))
    return Whole(part, ((table[:, 2:5], numbers.T, table[:1, 3], torch.empty(0)), 7, None))  # type: ignore[arg-type]


def tensors(bundle: Whole) -> list[Tensor]:
    return [bundle.part.ids, bundle.part.flags, *bundle.rest[0]]


def test_a_bundle_comes_back_as_it_was_after_one_copy_each_way() -> None:
    with torch.inference_mode(), PretendDevice() as device:
        before = whole()
        there = upload(before, DEVICE)
        assert (device.uploads, device.downloads) == (1, 0)
        assert all(tensor.device == DEVICE for tensor in tensors(there))
        assert (there.part.name, *there.rest[1:]) == ("part", 7, None)
        strided = Whole(there.part, (tuple(t.T for t in there.rest[0][:2]), 7, None))  # type: ignore[arg-type]
        back = download(strided)
        assert (device.uploads, device.downloads) == (1, 1)
        back = Whole(back.part, ((*(t.T for t in back.rest[0]), *whole().rest[0][2:]), 7, None))  # type: ignore[arg-type]
    for got, expected in zip(tensors(back), tensors(before), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_on_a_cpu_nothing_is_copied() -> None:
    before = whole()
    assert upload(before, torch.device("cpu")) is before
    assert download(before) is before


@pytest.mark.parametrize("size", [0, 1, 3, 16, 17])
def test_tensors_begin_at_aligned_addresses(size: int) -> None:
    _, firsts = pack([torch.zeros(size, dtype=torch.uint8), torch.zeros(2)], pinned=False)
    assert firsts[1] % ALIGNMENT == 0
    assert firsts[1] >= size


def test_parts_that_lie_one_after_the_other_are_joined_without_a_copy() -> None:
    whole = torch.arange(48, dtype=torch.uint8)
    parts = [whole[:16].view(torch.int64), whole[16:16], whole[16:48].view(torch.int32).view(2, 4)]
    joined = join(parts)
    assert (joined.data_ptr(), joined.tolist()) == (whole.data_ptr(), whole.tolist())
    swapped = join([parts[2], parts[0]])
    assert swapped.tolist() == [*range(16, 48), *range(16)]
    apart = join([whole[:8], whole[16:24]])
    assert apart.tolist() == [*range(8), *range(16, 24)]
    assert join([parts[1]]).shape == (0,)
