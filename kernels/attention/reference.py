"""Attention over a paged prefix and a causal or tree-shaped suffix, one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import UNSCALED, AttentionMeta, CacheScales


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    scales: CacheScales = UNSCALED,
) -> Tensor:
    """Packed queries q [T, Hq, D] over caches [num_blocks, S, Hkv, D] -> [T, Hq * D].

    Softmax and sums in float32. Query heads h * G .. h * G + G - 1 share KV head h, G = Hq / Hkv.
    """
    out = torch.empty_like(q)
    cu_q, prefix_lens = meta.cu_q.tolist(), meta.prefix_lens.tolist()
    for row, (prefix, first_key) in enumerate(
        zip(prefix_lens, meta.first_keys.tolist(), strict=True)
    ):
        first, last = cu_q[row], cu_q[row + 1]
        if first == last:
            continue
        suffix = suffix_visibility(meta.ancestors[first:last])
        end = prefix + suffix.shape[1]
        keys = gather(k_cache, meta.block_tables[row], first_key, end)
        values = gather(v_cache, meta.block_tables[row], first_key, end)
        visible = torch.cat((suffix.new_ones(last - first, prefix - first_key), suffix), dim=1)
        own = attend(q[first:last], keys, values, visible, scale * scales.key)
        out[first:last] = own if scales.value == 1.0 else own * scales.value
    return out.flatten(1)


def gather(cache: Tensor, block_table: Tensor, first: int, end: int) -> Tensor:
    """Cache positions first .. end-1 of a row, [end - first, Hkv, D] float32."""
    num_blocks = -(-end // cache.shape[1])
    return cache[block_table[:num_blocks].long()].flatten(0, 1)[first:end].float()


def suffix_visibility(ancestors: Tensor) -> Tensor:
    """[n, m] bool: whether each query sees each suffix entry. None sees entries from m on."""
    n = len(ancestors)
    order = torch.arange(max(n, 64), device=ancestors.device)
    causal = order[None, :] <= torch.arange(n, device=ancestors.device)[:, None]
    bits = (ancestors[:, None] >> order.clamp(max=63)[None, :]) & (order < 64)
    visible = torch.where(ancestors[:, None] == 0, causal, bits.bool())
    return visible[:, : int(visible.any(dim=0).nonzero().max()) + 1]


def attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v for one row: q [n, Hq, D], keys and values [m, Hkv, D]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    values = values.masked_fill(~visible.any(dim=0)[:, None, None], 0.0)  # unseen ones may be NaN
    scores = torch.einsum("nhd,mhd->hnm", q.float(), keys) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights, values).to(q.dtype)
