"""Linear layers over quantised weights: exact integer sums, and no bit depends on the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.linear.grouped import GroupedWeight, GroupLayout, quantise
from kernels.ops import Ops

LAYOUTS = [
    GroupLayout(4, 32, wide_scales=False, has_minimums=True),
    GroupLayout(4, 32, wide_scales=False, has_minimums=False),
    GroupLayout(4, 32, wide_scales=True, has_minimums=True),
    GroupLayout(8, 32, wide_scales=False, has_minimums=True),
    GroupLayout(8, 32, wide_scales=False, has_minimums=False),
    GroupLayout(8, 32, wide_scales=True, has_minimums=True),
    GroupLayout(8, 16, wide_scales=True, has_minimums=False),
]
MAX_CODES = {8: 127, 16: 127 * 256 + 127}  # by bits of inputs
TOLERANCE = 2e-5  # relative to the largest output: an input between two codes may become either


def a_weight(layout: GroupLayout, N: int, K: int, seed: int = 0) -> GroupedWeight:
    """Codes over their whole range, so that sums reach their bounds."""
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**layout.bits, (N, K), generator=made, dtype=torch.uint8)
    codes[0], codes[-1] = 2**layout.bits - 1, 0
    dtype = torch.float32 if layout.wide_scales else torch.float16
    scales = (torch.rand(N, K // layout.group, generator=made) / 10 - 0.03).to(dtype)
    minimums = torch.randn(scales.shape, generator=made).to(dtype)
    return GroupedWeight(codes, scales, minimums if layout.has_minimums else None, layout.bits)


def inputs(M: int, K: int) -> Tensor:
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1))
    x[0] = 3.0  # every code of this row is the largest
    return x


def rounded(x: Tensor, bits: int) -> Tensor:
    """Inputs as the kernel sees them: codes with one scale per 32, in float64."""
    groups, most = x.reshape(len(x), -1, 32), MAX_CODES[bits]
    largest = groups.abs().amax(-1, keepdim=True)
    codes = (groups * (most / largest)).round()
    return (codes.double() * (largest / most).double()).reshape(x.shape)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 32), (17, 96), (131, 1536)])
def test_linear_is_the_exact_product_of_codes(
    grouped: Ops, input_bits: int, layout: GroupLayout, N: int, K: int
) -> None:
    x, weight, bias = inputs(9, K), a_weight(layout, N, K), torch.linspace(-1, 1, N)
    got = grouped.linear(x, grouped.pack_linear(weight, bias))
    expected = rounded(x, input_bits) @ weight.dequantised().double().T + bias
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_row_is_the_same_in_every_batch(grouped: Ops, layout: GroupLayout) -> None:
    x, weight = inputs(40, 192), grouped.pack_linear(a_weight(layout, 150, 192), None)
    whole = grouped.linear(x, weight)
    for M in (1, 2, 3, 4, 5, 6, 7, 13, 33):
        assert torch.equal(grouped.linear(x[-M:].contiguous(), weight), whole[-M:]), M


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_embedding_gives_the_rows_of_the_weight(grouped: Ops, layout: GroupLayout) -> None:
    weight, ids = a_weight(layout, 50, 64), torch.tensor([49, 0, 17, 17])
    got = grouped.embedding(ids, grouped.pack_linear(weight, None))
    torch.testing.assert_close(got, weight.dequantised()[ids], atol=2e-6, rtol=2e-7)


@pytest.mark.parametrize(
    "layout", [GroupLayout(4, 128, True, False), GroupLayout(4, 64, False, True)], ids=str
)
def test_larger_groups_and_wide_scales_are_read_too(
    grouped: Ops, input_bits: int, layout: GroupLayout
) -> None:
    """As 4-bit safetensors have them."""
    x, weight = inputs(5, 256), a_weight(layout, 33, 256)
    got = grouped.linear(x, grouped.pack_linear(weight, None))
    expected = rounded(x, input_bits) @ weight.dequantised().double().T
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_inputs_are_nearly_exact(grouped: Ops, input_bits: int) -> None:
    x, weight = inputs(9, 1536), a_weight(LAYOUTS[0], 131, 1536)
    expected = x.double() @ weight.dequantised().double().T
    error = grouped.linear(x, grouped.pack_linear(weight, None)) - expected
    assert error.abs().max() <= {8: 8e-3, 16: 3e-5}[input_bits] * expected.abs().max()


def test_weights_of_several_layouts_are_one_product(grouped: Ops) -> None:
    x, parts = inputs(7, 64), [a_weight(layout, 20 + at, 64) for at, layout in enumerate(LAYOUTS)]
    alone = [grouped.pack_linear(part, torch.ones(len(part))) for part in parts]
    together = replace(alone[0], more=tuple(alone[1:]))
    expected = torch.cat([grouped.linear(x, part) for part in alone], dim=1)
    assert torch.equal(grouped.linear(x, together), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_unsound_input_makes_its_whole_row_nan_and_no_other(grouped: Ops, bad: float) -> None:
    x, weight = inputs(5, 64), grouped.pack_linear(a_weight(LAYOUTS[0], 30, 64), None)
    sound = grouped.linear(x, weight)
    x[3, 40] = bad
    got = grouped.linear(x, weight)
    assert got[3].isnan().all()
    others = [0, 1, 2, 4]
    assert torch.equal(got[others], sound[others])


def test_inputs_of_zeros_give_the_bias(grouped: Ops) -> None:
    weight = grouped.pack_linear(a_weight(LAYOUTS[0], 20, 32), torch.arange(20.0))
    assert torch.equal(grouped.linear(torch.zeros(2, 32), weight)[1], torch.arange(20.0))


@pytest.mark.parametrize(("bits", "steps"), [(8, 254), (4, 15)])
def test_quantising_errs_by_at_most_half_a_step(bits: int, steps: int) -> None:
    weight = torch.randn(9, 96, generator=torch.Generator().manual_seed(2))
    weight[3, 32:64] = 0
    groups = weight.reshape(9, 3, 32)
    spread = 2 * groups.abs().amax(-1) if bits == 8 else groups.amax(-1) - groups.amin(-1)
    errors = (quantise(weight, bits).dequantised() - weight).reshape(9, 3, 32).abs().amax(-1)
    # Scales and minimums are rounded to halves, by up to 2^-11 of themselves.
    allowed = spread / steps / 2 + 2**-10 * groups.abs().amax(-1)
    assert bool((errors <= allowed).all())
    assert bool((errors[3, 1] == 0).all())


def test_quantising_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match="40 inputs do not divide into groups of 32"):
        quantise(torch.ones(2, 40), 8)
