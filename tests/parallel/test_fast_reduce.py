"""Which all-reduce is used for which size; the operations themselves need several GPUs."""

from __future__ import annotations

import pytest

from engine.parallel.fast_reduce import MULTIMEM, NCCL, ONE_SHOT, TWO_SHOT, choose

KIB = 1024


@pytest.mark.parametrize(
    ("num_bytes", "size", "multicast", "expected"),
    [
        (16, 8, False, ONE_SHOT),
        (64 * KIB, 8, False, ONE_SHOT),
        (64 * KIB + 128, 8, False, TWO_SHOT),
        (64 * KIB + 16, 8, False, NCCL),  # does not divide into aligned shares
        (256 * KIB, 8, False, TWO_SHOT),
        (256 * KIB + 128, 8, False, NCCL),
        (24, 2, False, NCCL),  # not aligned
        (0, 2, False, NCCL),
        (16, 8, True, MULTIMEM),
        (256 * KIB, 8, True, MULTIMEM),
        (256 * KIB + 16, 8, True, NCCL),
    ],
)
def test_sizes_are_served_by(num_bytes: int, size: int, multicast: bool, expected: str) -> None:
    assert choose(num_bytes, size, multicast=multicast) == expected
