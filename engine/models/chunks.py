"""Attention to the keys of a query's own chunk of positions only (Llama 4's local layers).

A row that crosses the border of a chunk becomes several rows, one for each chunk, so that the keys
of a row begin at one position. A draft tree is never split: it must end before the border.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine.step.batch import ForwardBatch
from kernels.ops import AttentionMeta


def with_chunks(batch: ForwardBatch, chunk: int | None) -> ForwardBatch:
    """The batch with the attention of layers that see chunks of `chunk` positions; None: there are
    none."""
    if chunk is None:
        return batch
    longest = 1 if batch.only_roots else batch.attention.max_q
    return replace(batch, chunked=chunked(batch.attention, chunk, longest))


def chunked(meta: AttentionMeta, chunk: int, longest: int) -> AttentionMeta:
    """`meta` with each row cut at multiples of `chunk`, rows with ancestor masks excepted.

    Args:
        longest: at least as many queries as a row without masks has. It decides the number of
            rows, so that nothing waits for the device.
    """
    parts = 1 + -(-(longest - 1) // chunk)  # chunks that so many positions can touch
    first_chunk = meta.prefix_lens // chunk  # [B]
    reach = min(meta.max_context, chunk + meta.max_q)
    if parts == 1:
        return replace(meta, first_keys=first_chunk * chunk, max_context=reach)
    order = torch.arange(parts, dtype=torch.int32, device=meta.cu_q.device)
    borders = (first_chunk[:, None] + order) * chunk  # [B, parts] where chunks begin
    ends = (meta.prefix_lens + meta.cu_q.diff())[:, None]  # [B, 1] after the last query
    begins = borders.maximum(meta.prefix_lens[:, None]).minimum(ends)
    begins[:, 1:] = torch.where(_is_tree(meta)[:, None], ends, begins[:, 1:])
    return replace(
        meta,
        cu_q=torch.cat(((meta.cu_q[1:, None] - (ends - begins)).flatten(), meta.cu_q[-1:])),
        prefix_lens=begins.flatten(),
        first_keys=borders.minimum(begins).flatten(),
        block_tables=meta.block_tables.repeat_interleave(parts, dim=0),
        max_context=reach,
    )


def _is_tree(meta: AttentionMeta) -> Tensor:
    """[B] bool: whether a row's queries have masks."""
    first = meta.cu_q[:-1].clamp(max=len(meta.ancestors) - 1)
    return meta.ancestors[first.long()] != 0
