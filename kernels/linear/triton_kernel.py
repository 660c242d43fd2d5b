"""Linear layers and embedding on CUDA devices.

torch calls cuBLAS for bfloat16 products: a Triton kernel for few rows was slower inside a round
(docs/internals/numbers.md), and one for many would at best equal its Hopper kernels. The packed
weight is the plain [N, K] matrix, so that a tied embedding gathers its rows from it. Weights in FP8
and in groups of four bits have kernels of their own. Nothing outside this folder reads
`LinearWeight.data`, except that of experts, and a draft head's embedding.

A draft head's `fc` takes the concatenated features of three layers. No kernel fuses that copy: per
token of Llama 8B it is 24 KB, and the weight that multiplies it is 100 MB.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear import triton_groups, triton_scaled
from kernels.linear.grouped import GroupedWeight, GroupLayout
from kernels.linear.quantised import Part
from kernels.linear.scaled import ScaledLayout, ScaledWeight
from kernels.ops import LinearWeight
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

_BLOCK = 1024  # columns per program: one 128-bit load per thread
_KNOWN_SIZES = (576, 2048, 4096, 5120, 8192)  # SmolLM2, Llama 1B, 8B, Llama 4, 70B


def pack_linear(weight: Part, bias: Tensor | None) -> LinearWeight:
    """weight [N, K] and bias [N] of any float dtype, or None. Kept as [N, K], bias float32."""
    bias = None if bias is None else bias.float()
    if isinstance(weight, ScaledWeight):
        return triton_scaled.pack_scaled(weight, bias)
    if isinstance(weight, GroupedWeight):
        assert weight.bits == 4, f"{weight.bits} bits: no kernel reads these here"
        return triton_groups.pack_groups(weight, bias)
    return LinearWeight(weight.contiguous(), bias, *weight.shape)


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """x [T, K] -> [T, N] in x's dtype.

    The bias is added to the float32 sums before the only rounding. cuBLAS reads it in the dtype of
    the result; that is exact, since checkpoints of that dtype store it so.
    """
    if weight.layout is not None:
        return _quantised(x, weight)
    assert x.dtype == weight.data.dtype, f"{x.dtype} activations, {weight.data.dtype} weights"
    if weight.bias is None:
        return F.linear(x, weight.data)
    return F.linear(x, weight.data, weight.bias.to(x.dtype))


def _quantised(x: Tensor, weight: LinearWeight) -> Tensor:
    """A product for each part of one layout."""
    out, first = x.new_empty(len(x), weight.all_features), 0
    for part in (weight, *weight.more):
        own = out[:, first : first + part.out_features]
        if isinstance(part.layout, ScaledLayout):
            triton_scaled.linear_scaled(own, x, part)
        else:
            triton_groups.linear_groups(own, x, part)
        first += part.out_features
    return out


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
    await_inputs()
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + token)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(table_ptr + row * stride + columns, mask=columns < K)
    tl.store(out_ptr + token * K + columns, values, mask=columns < K)


def embedding(
    token_ids: Tensor, weight: LinearWeight, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Rows of the packed weight: ids [T] int64 -> [T, K] in the weight's dtype; in `dtype` if it is
    quantised."""
    if weight.layout is not None:
        return _quantised_rows(token_ids, weight).to(dtype)
    table = weight.data
    out = torch.empty(len(token_ids), table.shape[1], dtype=table.dtype, device=table.device)
    _launch(token_ids, table, out).run()
    return out


def _quantised_rows(token_ids: Tensor, weight: LinearWeight) -> Tensor:
    """Of an embedding in four bits, as some .gguf files have; in plain torch."""
    assert isinstance(weight.layout, GroupLayout)
    return triton_groups.unpacked_rows(weight, token_ids)


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
    rows = [
        _launch(ids, torch.empty(1000, K, **meta), torch.empty(64, K, **meta)) for K in _KNOWN_SIZES
    ]
    return [*rows, *triton_scaled.launches(), *triton_groups.launches()]
