"""The operations and the dtype that a configuration asks for."""

from __future__ import annotations

import torch

from configs.resolve import HostConfig
from kernels.native.build import NativeUnavailableError
from kernels.ops import Ops
from kernels.registry import build_ops, separate_drafting

INPUT_BITS = 8  # unless model.input_bits says otherwise


def configured_ops(
    config: HostConfig, device: torch.device, dtype: torch.dtype, threads: int
) -> Ops:
    """The operations that the configuration asks for.

    Raises:
        ValueError: its backend cannot be had here, or none of them rounds its inputs as
            `model.input_bits` says.
    """
    kernels, input_bits = config.kernels, config.model.input_bits
    try:
        ops = build_ops(
            kernels.backend,
            device,
            dtype,
            threads,
            config.files.dir,
            overlap=kernels.overlap,
            input_bits=input_bits or INPUT_BITS,
        )
    except NativeUnavailableError as error:
        raise ValueError(f"kernels.backend is {kernels.backend!r}: {error}") from error
    backend = ops.backends["linear"]
    if input_bits is not None and backend.name != "native":
        raise ValueError(
            f"model.input_bits = {input_bits} needs native kernels on a CPU, but linear layers run "
            f"on {backend}; leave it out"
        )
    return ops if kernels.fused_drafting else separate_drafting(ops)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that the configuration names."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
