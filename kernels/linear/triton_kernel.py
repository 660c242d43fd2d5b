"""Linear layers and embedding on CUDA devices.

torch calls cuBLAS for bfloat16 products: a Triton kernel would at best equal its Hopper kernels
(wgmma, split along K for few rows). The packed weight is the plain [N, K] matrix, so that a tied
embedding gathers its rows from it. Our own kernel would pay for quantised weights (int4, fp8);
until there is one, `reads_groups` is false and they are expanded at load. Nothing outside this
folder reads `LinearWeight.data`.

A draft head's `fc` takes the concatenated features of three layers. No kernel fuses that copy: per
token of Llama 8B it is 24 KB, and the weight that multiplies it is 100 MB.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import LinearWeight
from kernels.triton_launch import WIDEST_LOAD, Launch

_BLOCK = 1024  # columns per program: one 128-bit load per thread
_KNOWN_SIZES = (576, 2048, 4096, 5120, 8192)  # SmolLM2, Llama 1B, 8B, Llama 4, 70B


def pack_linear(weight: Tensor, bias: Tensor | None) -> LinearWeight:
    """weight [N, K] and bias [N] of any float dtype, or None. Kept as [N, K], bias float32."""
    return LinearWeight(weight.contiguous(), None if bias is None else bias.float(), *weight.shape)


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """x [T, K] -> [T, N] in x's dtype.

    The bias is added to the float32 sums before the only rounding. cuBLAS reads it in the dtype of
    the result; that is exact, since checkpoints of that dtype store it so.
    """
    assert x.dtype == weight.data.dtype, f"{x.dtype} activations, {weight.data.dtype} weights"
    if weight.bias is None:
        return F.linear(x, weight.data)
    return F.linear(x, weight.data, weight.bias.to(x.dtype))


@triton.jit
def _gather_rows_kernel(
    ids_ptr,  # [T] int64
    table_ptr,  # [N, K], rows `stride` apart
    out_ptr,  # [T, K] contiguous
    stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (t, b): columns b * BLOCK .. of row ids[t]."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + token)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(table_ptr + row * stride + columns, mask=columns < K)
    tl.store(out_ptr + token * K + columns, values, mask=columns < K)


def embedding(token_ids: Tensor, weight: LinearWeight) -> Tensor:
    """Rows of the packed weight: ids [T] int64 -> [T, K] in the weight's dtype."""
    table = weight.data
    out = torch.empty(len(token_ids), table.shape[1], dtype=table.dtype, device=table.device)
    _launch(token_ids, table, out).run()
    return out


def _launch(token_ids: Tensor, table: Tensor, out: Tensor) -> Launch:
    T, K = out.shape
    assert token_ids.dtype == torch.int64
    assert token_ids.is_contiguous()
    assert table.stride(1) == 1
    return Launch(
        name=f"embedding[K={K}, {str(out.dtype).removeprefix('torch.')}]",
        kernel=_gather_rows_kernel,
        grid=(T, triton.cdiv(K, _BLOCK)),
        arguments={
            "ids_ptr": token_ids,
            "table_ptr": table,
            "out_ptr": out,
            "stride": table.stride(0),
            "K": K,
            "BLOCK": _BLOCK,
        },
        num_warps=4,
        min_load_bits=WIDEST_LOAD,
    )


def launches() -> list[Launch]:
    """What the engine launches, for the hidden sizes of the models we know."""
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    ids = torch.empty(64, dtype=torch.int64, device="meta")
    return [
        _launch(ids, torch.empty(1000, K, **meta), torch.empty(64, K, **meta)) for K in _KNOWN_SIZES
    ]
