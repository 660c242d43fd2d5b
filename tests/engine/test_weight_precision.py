"""What serving adds to what quantising a model has cost: the bundled model, rounded to the nearest
numbers of published formats, against the same numbers in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.linear.grouped import GroupedWeight
from kernels.ops import Ops
from tests.support.files.quantised_files import FP8_CHANNEL, four_bits
from tests.support.machine.threads import own_torch_threads
from tests.support.models.perplexity import (
    CHECKPOINT,
    Windows,
    changed,
    perplexity,
    rounding_inputs,
    windows,
)

pytestmark = pytest.mark.extended
NUM_WINDOWS = 2


@pytest.fixture(scope="module")
def texts(native_cache: Path) -> Iterator[Windows]:
    with own_torch_threads():
        yield windows(native_cache, NUM_WINDOWS)


def test_fp8_costs_little_and_rounding_inputs_less_than_one_per_cent(
    native_ops: Ops, texts: Windows
) -> None:
    arch, read = CHECKPOINT.arch, changed(lambda weight: FP8_CHANNEL.write(weight)[1])
    plain = perplexity(arch, CHECKPOINT.stored, native_ops, texts)
    weights = perplexity(arch, read, native_ops, texts)
    inputs = perplexity(arch, read, rounding_inputs(native_ops), texts)
    assert plain < weights < 1.03 * plain
    assert inputs == pytest.approx(weights, rel=0.01)
    assert inputs != weights


@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bits_as_they_are_stored_cost_nothing_more(
    native_ops: Ops, texts: Windows, symmetric: bool
) -> None:
    """Groups of 128 inputs, where these divide the inputs."""

    def in_groups(weight: Tensor) -> GroupedWeight:
        group = 128 if weight.shape[1] % 128 == 0 else 64
        codes, scales, zeros = four_bits(weight, group, symmetric)
        least = None if symmetric else (-scales * zeros)
        kept = scales.half() if symmetric else scales
        return GroupedWeight(codes.to(torch.uint8), kept, least, 4)

    arch = CHECKPOINT.arch
    stored = perplexity(arch, changed(in_groups), native_ops, texts, "stored")
    plain = perplexity(arch, changed(in_groups), native_ops, texts, "plain")
    assert stored == pytest.approx(plain, rel=5e-4)
    assert stored != plain
