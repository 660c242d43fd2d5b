"""The input of an EAGLE-3 head in one launch: embedding, two norms and their concatenation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.drafting.nodes import HeadInput
from kernels.norm.triton_kernel import MAX_HIDDEN
from kernels.ops import LinearWeight
from kernels.triton_launch import WIDEST_LOAD, Launch, pointers
from kernels.triton_overlap import await_inputs


@triton.jit
def _normed(values, weight_ptr, columns, inside, eps, H: tl.constexpr):
    """As `rms_norm` for one row, in float32."""
    values = values.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / H + eps)
    return values * scale * weight


@triton.jit
def _enter_head_kernel(
    token_ids_ptr,  # [C] int64
    table_ptr,  # [V, H], rows table_stride apart
    features_ptr,  # [*, H], rows features_stride apart
    feature_of_ptr,  # [C] int64, the row of each entry's feature; None: the entry's own
    embedding_norm_ptr,  # [H] float32
    feature_norm_ptr,  # [H] float32
    x_ptr,  # [C, 2H] out
    residual_ptr,  # [C, H] out
    table_stride,
    features_stride,
    embedding_eps,
    feature_eps,
    NORMED_RESIDUAL: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least H
):
    """One half of one entry: the embedding, or the feature and the residual stream; grid (C, 2)."""
    await_inputs()
    entry = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    out = x_ptr + entry * (2 * H) + columns
    if tl.program_id(1) == 0:
        row = tl.load(token_ids_ptr + entry)
        values = tl.load(table_ptr + row * table_stride + columns, mask=inside, other=0.0)
        embedded = _normed(values, embedding_norm_ptr, columns, inside, embedding_eps, H)
        tl.store(out, embedded.to(x_ptr.dtype.element_ty), mask=inside)
    else:
        row = entry
        if feature_of_ptr is not None:
            row = tl.load(feature_of_ptr + entry)
        values = tl.load(features_ptr + row * features_stride + columns, mask=inside, other=0.0)
        normed = _normed(values, feature_norm_ptr, columns, inside, feature_eps, H).to(
            x_ptr.dtype.element_ty
        )
        tl.store(out + H, normed, mask=inside)
        kept = normed if NORMED_RESIDUAL else values
        tl.store(residual_ptr + entry * H + columns, kept, mask=inside)


def enter_head(given: HeadInput, embedding: LinearWeight) -> tuple[Tensor, Tensor]:
    """[C, 2H], the normalised embedding and feature of each entry; and [C, H], the residual stream.
    H is at most 16384, and the embedding is not quantised."""
    C, H = len(given.token_ids), given.features.shape[1]

    def new(width: int) -> Tensor:
        return torch.empty(C, width, dtype=given.features.dtype, device=given.features.device)

    x, residual = new(2 * H), new(H)
    launch(given, embedding, x, residual).run()
    return x, residual


def launch(given: HeadInput, embedding: LinearWeight, x: Tensor, residual: Tensor) -> Launch:
    features, table = given.features, embedding.data
    assert embedding.layout is None
    C, H = residual.shape
    assert H <= MAX_HIDDEN, f"hidden size {H}, at most {MAX_HIDDEN}"
    assert table.dtype == features.dtype
    assert features.stride(1) == table.stride(1) == 1
    assert all(part is None or part.is_contiguous() for part in (given.token_ids, given.feature_of))
    block = triton.next_power_of_2(H)
    kind = str(features.dtype).removeprefix("torch.")
    return Launch(
        name=f"enter_head[H={H}, {kind}{'' if given.feature_of is None else ', gathered'}]",
        kernel=_enter_head_kernel,
        grid=(C, 2),
        arguments={
            **pointers("", given),
            "table_ptr": table,
            "x_ptr": x,
            "residual_ptr": residual,
            "table_stride": table.stride(0),
            "features_stride": features.stride(0),
            "embedding_eps": given.embedding_eps,
            "feature_eps": given.feature_eps,
            "NORMED_RESIDUAL": given.normed_residual,
            "H": H,
            "BLOCK": block,
        },
        num_warps=min(max(block // 512, 1), 32),
        min_load_bits=WIDEST_LOAD,
    )


def example_launches() -> list[Launch]:
    """For the hidden sizes of the models we know."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    C, found = 64, []
    for H in (576, 2048, 4096, 5120, 8192):
        ids, weight = new(C, dtype=torch.int64), new(H, dtype=torch.float32)
        for feature_of in (None, ids)[: 2 if H == 4096 else 1]:
            given = HeadInput(ids, new(C, H), feature_of, weight, 1e-5, weight, 1e-5, False)
            embedding = LinearWeight(new(1000, H), None, 1000, H)
            found.append(launch(given, embedding, new(C, 2 * H), new(C, H)))
    return found
