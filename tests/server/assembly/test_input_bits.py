"""How finely products with quantised weights round their inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.host import host_config
from kernels.linear.grouped import quantise
from kernels.ops import Ops
from server.assembly.operations import configured_ops

CPU = torch.device("cpu")
WEIGHT = quantise(torch.randn(48, 64, generator=torch.Generator().manual_seed(3)), 4)
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))


def ops_of(cache: Path, *settings: str) -> Ops:
    config = host_config(None, [f"files.dir={cache}", *settings])
    return configured_ops(config, CPU, torch.float32, 1)


def product(ops: Ops) -> Tensor:
    return ops.linear(X, ops.pack_linear(WEIGHT, None))


def test_eight_bits_are_the_default_and_sixteen_are_nearly_exact(native_cache: Path) -> None:
    default, eight, sixteen = (
        ops_of(native_cache, *settings)
        for settings in ((), ("model.input_bits=8",), ("model.input_bits=16",))
    )
    if default.backends["linear"].name != "native":
        pytest.skip(f"no native kernels here: {default.backends['linear']}")
    exact = X @ WEIGHT.dequantised().T
    errors = [(product(ops) - exact).abs().max() / exact.abs().max() for ops in (eight, sixteen)]
    assert torch.equal(product(default), product(eight))
    assert errors[1] < 1e-4 < errors[0] < 1e-2


def test_kernels_that_do_not_round_inputs_refuse_the_setting(tmp_path: Path) -> None:
    ops_of(tmp_path, "kernels.backend=reference")
    with pytest.raises(ValueError, match=r"model\.input_bits = 8 needs native kernels on a CPU"):
        ops_of(tmp_path, "kernels.backend=reference", "model.input_bits=8")
