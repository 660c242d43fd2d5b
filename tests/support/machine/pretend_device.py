"""A pretended device: its tensors claim to be on "meta", but hold numbers in host memory.

Inside `PretendDevice`, an operation that mixes host and device fails, as on a GPU; copies between
them and waits for the device are counted. So a CPU can show that a step stays on its device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from kernels.ops import Ops

DEVICE = torch.device("meta")
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "is_nonzero",
    "equal",
    "bincount",
    "repeat_interleave.Tensor",
)


class Far(Tensor):
    """A tensor of the pretended device that wraps a host tensor."""

    near: Tensor

    @staticmethod
    def __new__(cls: type[Far], near: Tensor) -> Far:
        made: Far = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of PretendDevice")


class PretendDevice(TorchDispatchMode):
    """Checks and counts the operations inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads = 0
        self.downloads = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        far = any(isinstance(x, Far) for x in tensors)
        mixed = far and any(not isinstance(x, Far) and x.dim() for x in tensors)
        device = kwargs.get("device", next((x for x in args if isinstance(x, torch.device)), None))
        name = func.__name__
        goes_far = device is not None and torch.device(device).type == DEVICE.type
        args, kwargs = tree_map(_device_of_the_host, (args, kwargs))
        if name.startswith("copy_"):
            self._count_copy(args[0], args[1])
        elif mixed:
            raise RuntimeError(f"{func}: tensors of the host and of the device")
        elif name.startswith(("to.", "_to_copy")) and device is not None:
            self.uploads += goes_far and not far
            self.downloads += far and not goes_far
        elif far and (name.startswith(WAITING) or _has_bool_index(name, args)):
            self.waits.append(str(func))
        near_args, near_kwargs = tree_map(_near, (args, kwargs))
        out = func(*near_args, **near_kwargs)
        if name.startswith("copy_"):
            return args[0]
        stays_far = far and device is None
        return tree_map(_far, out) if goes_far or stays_far else out

    def _count_copy(self, target: Tensor, source: Tensor) -> None:
        self.uploads += isinstance(target, Far) and not isinstance(source, Far)
        self.downloads += isinstance(source, Far) and not isinstance(target, Far)


def _has_bool_index(name: str, args: Any) -> bool:
    if not name.startswith(("index.", "index_put")):
        return False
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])


def _device_of_the_host(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


def _far(value: Any) -> Any:
    return Far(value) if isinstance(value, Tensor) and not isinstance(value, Far) else value


def operations_of(ops: Ops) -> Ops:
    """The CPU operations `ops`, for tensors of the pretended device only."""
    changed = {
        field.name: _on_device(getattr(ops, field.name))
        for field in dataclasses.fields(ops)
        if callable(getattr(ops, field.name))
    }
    return dataclasses.replace(ops, **changed)


def _on_device(operation: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        near = tuple(_unwrapped(arg) for arg in args)
        with _disable_current_modes():
            return _wrapped(operation(*near))

    return run


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        assert isinstance(value, Far), "a tensor of the host was given to a kernel"
        return value.near
    return _parts(value, _unwrapped)


def _wrapped(value: Any) -> Any:
    return Far(value) if isinstance(value, Tensor) else _parts(value, _wrapped)


def _parts(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple | list):
        parts = [change(part) for part in value]
        is_named = hasattr(value, "_fields")  # a NamedTuple takes its parts one by one
        return type(value)(*parts) if is_named else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: change(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
