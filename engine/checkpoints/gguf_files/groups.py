"""Quantised GGUF blocks as grouped weights, number for number.

The layouts are those of ggml's ggml-common.h. A block holds 32 weights of a row (256 for the K
kinds, in sub-blocks of 32 or 16 with scales of their own).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.linear.grouped import GroupedWeight

Blocks = npt.NDArray[np.uint8]  # [blocks, bytes per block]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float16] | npt.NDArray[np.float32]
# codes [blocks, weights per block], scales and minimums [blocks, groups per block], bits
Parts = tuple[Bytes, Floats, Floats | None, int]


def grouped(kind: str, raw: Bytes, shape: tuple[int, ...]) -> GroupedWeight | None:
    """The weight of `shape` [N, K] whose blocks `raw` holds; None if the kind has no groups that
    our kernels read."""
    if kind not in READERS or len(shape) != 2:
        return None
    block_bytes, read = READERS[kind]
    codes, scales, minimums, bits = read(raw.reshape(-1, block_bytes))
    rows = shape[0]
    return GroupedWeight(
        _rows(codes, rows),
        _rows(scales, rows),
        None if minimums is None else _rows(minimums, rows),
        bits,
    )


def _rows(values: npt.NDArray[np.generic], rows: int) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).reshape(rows, -1))


def _halves(blocks: Blocks, first: int, count: int = 1) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, first : first + 2 * count]).view(np.float16)


def _nibbles(packed: Bytes) -> Bytes:
    """The lower halves of all bytes of the last axis, then the upper halves."""
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _fifth_bits(blocks: Blocks, first: int) -> Bytes:
    """Bit i of a 32-bit word as 16 * bit, for i = 0 .. 31."""
    bits = np.unpackbits(blocks[:, first : first + 4], axis=-1, bitorder="little")
    return bits << np.uint8(4)


def _q4_0(blocks: Blocks) -> Parts:
    return _nibbles(blocks[:, 2:]), _halves(blocks, 0), None, 4


def _q4_1(blocks: Blocks) -> Parts:
    return _nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2), 4


def _q5_0(blocks: Blocks) -> Parts:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return codes + np.uint8(128 - 16), _halves(blocks, 0), None, 8


def _q5_1(blocks: Blocks) -> Parts:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return codes, _halves(blocks, 0), _halves(blocks, 2), 8


def _q8_0(blocks: Blocks) -> Parts:
    return blocks[:, 2:] ^ np.uint8(128), _halves(blocks, 0), None, 8


def _k_scales(blocks: Blocks) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scales and minimums of the eight sub-blocks of Q4_K and Q5_K: six bits each, packed in
    twelve bytes, times the block's own factors."""
    packed = blocks[:, 4:16].reshape(-1, 3, 4)
    low, high, rest = packed[:, 0], packed[:, 1], packed[:, 2]
    scales = np.concatenate((low & 63, (rest & 15) | (low >> 6 << 4)), axis=-1)
    minimums = np.concatenate((high & 63, (rest >> 4) | (high >> 6 << 4)), axis=-1)
    factors = _halves(blocks, 0, 2).astype(np.float32)
    return factors[:, :1] * scales, -factors[:, 1:] * minimums


def _q4_k(blocks: Blocks) -> Parts:
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(len(blocks), -1)
    return codes, *_k_scales(blocks), 4


def _q5_k(blocks: Blocks) -> Parts:
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]  # bit j belongs to sub-block j
    fifth = (blocks[:, None, 16:48] >> shifts & np.uint8(1)) << np.uint8(4)
    return (codes | fifth).reshape(len(blocks), -1), *_k_scales(blocks), 8


def _q6_k(blocks: Blocks) -> Parts:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & np.uint8(3)
    codes = (low | high << np.uint8(4)) + np.uint8(128 - 32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    wide = _halves(blocks, 208).astype(np.float32) * scales
    return codes.reshape(len(blocks), -1), wide, None, 8


READERS: dict[str, tuple[int, Callable[[Blocks], Parts]]] = {  # kind -> bytes per block, reader
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}
