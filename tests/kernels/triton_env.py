"""How tests run Triton kernels: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0.

Triton decides while it is imported, so tests/conftest.py imports this file before anything can
import Triton. A test file of kernels begins with

    kernel = triton_env.load("kernels.norm.triton_kernel")  # skips the file where Triton is missing
    pytestmark = triton_env.MARKS

and makes its tensors on `triton_env.DEVICE`. Tests that compile instead of interpreting run a child
process, which does not inherit the variable: see test_triton_sm90.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None
MISSING = "Triton is not installed (it has wheels for Linux only)"
VARIABLE = "TRITON_INTERPRET"
# The interpreter computes even masked lanes with numpy, which warns about their values.
MARKS = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
# Kernel against the float32 reference on the same stored inputs, by dtype of the result. bfloat16:
# one step, since the interpreter cuts off where a GPU rounds. float32: sums in another order.
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"atol": 2e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 1e-5, "rtol": 2**-7},
}


def start() -> bool:
    """Import Triton, as interpreter unless the environment says otherwise; True if so.

    Child processes do not inherit the choice, or else a server on a GPU would interpret its
    kernels.
    """
    if not INSTALLED:
        return False
    assert "triton" not in sys.modules, "Triton was imported before its tests could choose"
    given = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1" if given is None else given
    triton = importlib.import_module("triton")
    if given is None:
        del os.environ[VARIABLE]
        triton.knobs.propagate_env = False  # the next line would set the variable again
        triton.knobs.runtime.interpret = True
        triton.knobs.propagate_env = True
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        _read_scalars_with_new_numpy()
    if triton.knobs.runtime.interpret:
        _round_to_fp8()
    return bool(triton.knobs.runtime.interpret)


def _round_to_fp8() -> None:
    """The interpreter makes 64 of 127.9, where the nearest FP8 number is 128, and cuts bits off
    small numbers."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    convert = interpreter._convert_float

    def convert_rightly(values: Any, kind: Any, to: Any, rounding: Any) -> Any:
        if (kind, to) != (language.float32, language.float8e4nv):
            return convert(values, kind, to, rounding)
        wide = torch.from_numpy(values.view("float32").copy())
        return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = convert_rightly


def _read_scalars_with_new_numpy() -> None:
    """numpy 2.4 no longer converts an array of one element to a number, but the interpreter of
    older Triton reads loop bounds that way."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_more(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_more


INTERPRETED = start()
DEVICE = torch.device("cpu" if INTERPRETED or not INSTALLED else "cuda")


def load(module: str) -> ModuleType:
    """A module of kernels; without Triton, skips the test file that loads it."""
    if not INSTALLED:
        pytest.skip(MISSING, allow_module_level=True)
    return importlib.import_module(module)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def spaced(tensor: Tensor) -> Tensor:
    """The same values with rows that are not contiguous, NaN between them."""
    rows = poison(*tensor.shape[:-1], tensor.shape[-1] + 24, dtype=tensor.dtype)
    rows[..., : tensor.shape[-1]] = tensor
    return rows[..., : tensor.shape[-1]]


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that must be written before it is read."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty`, `Tensor.new_empty` and `torch.empty_like` give NaN, which a kernel's outputs
    and scratch may hold in production, too."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _filled(getattr(owner, name)))


def _filled(make: Any) -> Any:
    def filled(*args: Any, **options: Any) -> Tensor:
        made = make(*args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(-1)

    return filled


def close(got: Tensor, expected: Tensor, **looser: float) -> None:
    """Compare; the dtype of `got` sets the tolerance, and `expected` was computed in float32."""
    tolerance = TOLERANCE[got.dtype] | looser
    torch.testing.assert_close(got.float(), expected.float(), **tolerance)
