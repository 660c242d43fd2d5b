"""Copies between host and device: one transfer for any number of tensors.

`upload` copies a whole bundle of host tensors to the device at once, `download` copies one back. A
bundle is a tensor, or a tuple or dataclass of bundles and other values, which stay as they are. On
a CPU both return the bundle itself.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: Triton compiles kernels again for addresses that are less aligned

Bundle = TypeVar("Bundle")


def upload(bundle: Bundle, device: torch.device) -> Bundle:
    """The bundle with its host tensors on `device`, after one copy from pinned memory. The host
    does not wait."""
    if device.type == "cpu":
        return bundle
    found: list[Tensor] = []
    _map(bundle, lambda tensor: _note(tensor, found, on_host=True))
    if not found:
        return bundle
    packed, firsts = pack(found, pinned=device.type == "cuda")
    there = packed.to(device, non_blocking=True)
    views = iter([view(there, first, like) for first, like in zip(firsts, found, strict=True)])
    replaced: Bundle = _map(bundle, lambda t: next(views) if t.device.type == "cpu" else t)
    return replaced


def download(bundle: Bundle) -> Bundle:
    """The bundle with its device tensors on the host, after one copy. Waits for the device."""
    found: list[Tensor] = []
    _map(bundle, lambda tensor: _note(tensor, found, on_host=False))
    if not found:
        return bundle
    found.sort(key=lambda tensor: -tensor.itemsize)  # so that each starts aligned for its dtype
    here = join(found).cpu()
    views, first = {}, 0
    for tensor in found:
        views[id(tensor)] = view(here, first, tensor)
        first += tensor.numel() * tensor.itemsize
    replaced: Bundle = _map(bundle, lambda tensor: views.get(id(tensor), tensor))
    return replaced


class Fetch:
    """A copy from the device that has been started. It runs in stream order: work queued later
    does not change what it copies."""

    def __init__(self, there: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if there.device.type != "cuda":
            self._here = there.cpu()
            return
        self._here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
        self._here.copy_(there, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> Tensor:
        """Wait for the copy and return it, a host tensor."""
        if self._event is not None:
            self._event.synchronize()
        return self._here


def join(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors on one device, concatenated, [bytes] uint8; a view of them if they lie
    one after the other in memory."""
    parts = [_flat(tensor).view(torch.uint8) for tensor in tensors if tensor.numel()]
    if not parts:
        return torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
    if _are_adjacent(parts):
        return parts[0].as_strided((sum(map(len, parts)),), (1,))
    return torch.cat(parts)


def _are_adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether each of these tensors of bytes begins where the one before ends."""
    return all(
        part.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
        and part.data_ptr() == before.data_ptr() + len(before)
        for before, part in itertools.pairwise(parts)
    )


def _flat(tensor: Tensor) -> Tensor:
    """The tensor in one dimension of stride 1; one-element tensors may have another stride."""
    return tensor.contiguous().as_strided((tensor.numel(),), (1,))


def pack(tensors: Sequence[Tensor], *, pinned: bool) -> tuple[Tensor, list[int]]:
    """The bytes of host tensors in one, [bytes] uint8, and the aligned offset of each."""
    firsts, size = [], 0
    for tensor in tensors:
        firsts.append(size)
        size += -(-tensor.numel() * tensor.itemsize // ALIGNMENT) * ALIGNMENT
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    for first, tensor in zip(firsts, tensors, strict=True):
        view(packed, first, tensor).copy_(tensor)
    return packed, firsts


def view(packed: Tensor, first: int, like: Tensor) -> Tensor:
    """Bytes from `first` of `packed`, as a tensor of the shape and dtype of `like`."""
    return packed[first : first + like.numel() * like.itemsize].view(like.dtype).view(like.shape)


def _note(tensor: Tensor, found: list[Tensor], *, on_host: bool) -> Tensor:
    if (tensor.device.type == "cpu") == on_host:
        found.append(tensor)
    return tensor


def _map(bundle: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The bundle with every tensor changed, in a fixed order."""
    if isinstance(bundle, Tensor):
        return change(bundle)
    if isinstance(bundle, tuple):
        return tuple(_map(part, change) for part in bundle)
    if dataclasses.is_dataclass(bundle) and not isinstance(bundle, type):
        parts = {f.name: _map(getattr(bundle, f.name), change) for f in dataclasses.fields(bundle)}
        return dataclasses.replace(bundle, **parts)
    return bundle
