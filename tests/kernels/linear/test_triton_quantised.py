"""Triton products with quantised weights against their plain numbers in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.linear.grouped import GroupedWeight, quantise
from kernels.linear.scaled import FP8, ScaledLayout, ScaledWeight
from kernels.moe import reference
from kernels.ops import ExpertWeights, LinearWeight
from tests.kernels import triton_env
from tests.kernels.moe.test_triton_moe import some_of
from tests.kernels.triton_env import DEVICE, close, numbers, spaced

kernel = triton_env.load("kernels.linear.triton_kernel")
scaled = triton_env.load("kernels.linear.triton_scaled")
experts = triton_env.load("kernels.moe.triton_kernel")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]

# Of products of rounded numbers, to the largest output: a number halfway between two of FP8 may
# become either.
TIES = 0.005


def rounded(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """FP8 numbers of x as float32, and the scale of each block."""
    blocks = torch.arange(x.shape[1], device=DEVICE) // block
    count = int(blocks[-1]) + 1
    largest = torch.stack([x[:, blocks == each].abs().amax(1) for each in range(count)], dim=1)
    scales = torch.where(largest > 0, largest / 448, 1.0)
    return (x / scales[:, blocks]).to(FP8).float(), scales


def as_rounded(x: Tensor, block: int) -> Tensor:
    values, scales = rounded(x, block)
    return values * scales.repeat_interleave(block, dim=1)[:, : x.shape[1]]


def a_scaled(N: int, K: int, block: int, rounds: bool, bound: float | None = None) -> ScaledWeight:
    scales = torch.rand(N, -(-K // block), generator=torch.Generator().manual_seed(5)) + 0.5
    layout = ScaledLayout(block, rounds, bound)
    return ScaledWeight(numbers(N, K, seed=1).to(FP8), scales.to(DEVICE), layout)


def a_grouped(N: int, K: int, group: int, *, wide: bool, minimums: bool) -> GroupedWeight:
    made = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (N, K), generator=made, dtype=torch.uint8).to(DEVICE)
    dtype = torch.float32 if wide else torch.float16
    scales, least = (torch.randn(N, K // group, generator=made).to(DEVICE, dtype) for _ in "ab")
    return GroupedWeight(codes, scales, least if minimums else None, 4)


@pytest.mark.parametrize(
    ("T", "N", "K", "block"), [(1, 40, 96, 96), (21, 33, 300, 128), (70, 96, 160, 160)]
)
@pytest.mark.parametrize("rounds", [False, True])
def test_fp8_products_are_those_of_the_plain_numbers(
    T: int, N: int, K: int, block: int, rounds: bool
) -> None:
    weight, bias, x = a_scaled(N, K, block, rounds), numbers(N, seed=2), spaced(numbers(T, K))
    got = kernel.linear(x, kernel.pack_linear(weight, bias))
    inputs = as_rounded(x, block) if rounds else x
    expected = inputs @ weight.dequantised().T + bias
    assert (got - expected).abs().max() <= TIES * expected.abs().max()


def test_inputs_that_are_fp8_numbers_are_not_changed() -> None:
    """So the product is exact: rounding is the only error."""
    weight = a_scaled(24, 256, 256, rounds=True)
    x = numbers(3, 256).to(FP8).float()
    x[:, 0] = 448.0  # the scale is 1
    close(kernel.linear(x, kernel.pack_linear(weight, None)), x @ weight.dequantised().T, atol=1e-2)


@pytest.mark.parametrize("block", [300, 128])
def test_rows_are_rounded_to_fp8_with_their_own_scales(block: int) -> None:
    x, factors = spaced(numbers(5, 300)), numbers(5, seed=7).abs()
    x[2] = 0.0
    values, scales = scaled.round_rows(x, ScaledLayout(block, True, None), factors)
    wanted, wanted_scales = rounded(x * factors[:, None], block)
    close(scales, wanted_scales)
    # Of numbers halfway between two of FP8, division decides by its last bit.
    assert (values.float() != wanted).float().mean() < 0.01


def test_inputs_beyond_the_bound_are_cut_off() -> None:
    x = torch.tensor([[2000.0, -1.0, 3000.0, 600.0]], device=DEVICE)
    values, scales = scaled.round_rows(x, ScaledLayout(4, True, 1200.0))
    cut = torch.tensor([[1200.0, -1.0, 1200.0, 600.0]], device=DEVICE)
    close(values.float() * scales, cut, rtol=0.07)


@pytest.mark.parametrize(
    ("T", "N", "K", "group", "wide", "minimums"),
    [
        (1, 40, 256, 128, False, False),
        (5, 33, 96, 32, True, True),
        (37, 16, 192, 64, False, True),
        (65, 80, 96, 96, True, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_four_bit_products_are_those_of_the_plain_numbers(
    T: int, N: int, K: int, group: int, wide: bool, minimums: bool, dtype: torch.dtype
) -> None:
    weight = a_grouped(N, K, group, wide=wide, minimums=minimums)
    x, bias = spaced(numbers(T, K, dtype=dtype)), numbers(N, seed=2)
    got = kernel.linear(x, kernel.pack_linear(weight, bias))
    expected = x.float() @ weight.dequantised().T + bias
    assert (got.shape, got.dtype) == ((T, N), dtype)
    assert (got - expected).abs().max() <= (
        1e-5 if dtype == torch.float32 else 1e-2
    ) * expected.abs().max()


def test_parts_of_several_layouts_are_one_product() -> None:
    """As the q, k and v of a file whose layers differ."""
    parts = (a_grouped(16, 96, 32, wide=True, minimums=True), a_scaled(8, 96, 96, rounds=False))
    first, second = (kernel.pack_linear(part, None) for part in parts)
    joined = LinearWeight(
        first.data, None, 16, 96, first.layout, first.scales, first.minimums, (second,)
    )
    x = numbers(3, 96)
    expected = x @ torch.cat([part.dequantised() for part in parts]).T
    close(kernel.linear(x, joined), expected, atol=2e-4)


def test_rows_of_a_four_bit_embedding_are_plain_numbers() -> None:
    weight, ids = quantise(numbers(50, 64), 4), torch.tensor([49, 0, 7, 7], device=DEVICE)
    got = kernel.embedding(ids, kernel.pack_linear(weight, None), torch.float32)
    close(got, weight.dequantised()[ids])


def stack(E: int, N: int, K: int, block: int, rounds: bool) -> tuple[LinearWeight, Tensor]:
    """Packed weights of all experts, and their plain numbers [E, in, out]."""
    every = [a_scaled(N, K, block, rounds) for _ in range(E)]
    values = torch.stack([numbers(N, K, seed=10 + e).to(FP8) for e in range(E)])
    scales = torch.stack([each.scales * (e + 1) / K**0.5 for e, each in enumerate(every)])
    plain = [
        ScaledWeight(v, s, every[0].layout).dequantised().T
        for v, s in zip(values, scales, strict=True)
    ]
    return LinearWeight(values, None, N, K, every[0].layout, scales), torch.stack(plain)


@pytest.mark.parametrize(
    ("T", "E", "H", "F", "block"), [(1, 4, 96, 80, 0), (7, 16, 160, 40, 128), (101, 3, 40, 32, 0)]
)
@pytest.mark.parametrize("rounds", [False, True])
def test_fp8_experts_equal_the_reference(
    T: int, E: int, H: int, F: int, block: int, rounds: bool
) -> None:
    x, logits = spaced(numbers(T, H)), numbers(T, E, seed=3)
    (gate_up, wide_gate_up), (down, wide_down) = (
        stack(E, 2 * F, H, block or H, rounds),
        stack(E, H, F, block or F, rounds),
    )
    got = experts.moe(x, logits, ExpertWeights((gate_up,), (down,)))
    plain = (LinearWeight(wide_gate_up, None, 2 * F, H), LinearWeight(wide_down, None, H, F))
    expected = reference.moe(x, logits, ExpertWeights(plain[:1], plain[1:]))
    # Rounded twice, each number by up to a sixteenth.
    assert (got - expected).abs().max() <= (0.1 if rounds else 1e-4) * expected.abs().max()


def test_fp8_experts_that_are_not_held_give_zeros() -> None:
    x, logits, held = numbers(33, 48), numbers(33, 5, seed=3), range(1, 3)
    (gate_up, _), (down, _) = stack(5, 32, 48, 48, True), stack(5, 48, 16, 16, True)
    every = ExpertWeights((gate_up,), (down,))
    mine = torch.isin(logits.argmax(dim=1), torch.tensor(held, device=x.device))
    got = experts.moe(x, logits, some_of(every, held))
    assert torch.equal(got, experts.moe(x, logits, every) * mine[:, None])


def grouped_stack(
    E: int, N: int, K: int, group: int, *, minimums: bool
) -> tuple[LinearWeight, Tensor]:
    """As `stack`, of four bits."""
    every = [a_grouped(N, K, group, wide=minimums, minimums=minimums) for _ in range(E)]
    scales = torch.stack([each.scales * (e + 1) / K for e, each in enumerate(every)])
    least = torch.stack([each.scales / 8 / K for each in every]) if minimums else None
    parts = [
        GroupedWeight(each.codes, scales[e], None if least is None else least[e], 4)
        for e, each in enumerate(every)
    ]
    pairs = torch.stack([part.pairs for part in parts])
    plain = torch.stack([part.dequantised().T for part in parts])
    return LinearWeight(pairs, None, N, K, parts[0].layout, scales, least), plain


@pytest.mark.parametrize(
    ("T", "E", "H", "F", "group", "dtype"),
    [
        (1, 4, 96, 64, 32, torch.float32),
        (7, 16, 128, 64, 64, torch.bfloat16),
        (101, 3, 64, 96, 32, torch.float32),  # tiles of many rows
    ],
)
@pytest.mark.parametrize("minimums", [False, True])
def test_four_bit_experts_equal_the_reference(
    T: int, E: int, H: int, F: int, group: int, dtype: torch.dtype, minimums: bool
) -> None:
    x, logits = spaced(numbers(T, H, dtype=dtype)), numbers(T, E, seed=3)
    (gate_up, wide_gate_up), (down, wide_down) = (
        grouped_stack(E, 2 * F, H, group, minimums=minimums),
        grouped_stack(E, H, F, group, minimums=minimums),
    )
    got = experts.moe(x, logits, ExpertWeights((gate_up,), (down,)))
    assert (got.shape, got.dtype) == ((T, H), dtype)
    plain = (LinearWeight(wide_gate_up, None, 2 * F, H), LinearWeight(wide_down, None, H, F))
    expected = reference.moe(x.float(), logits, ExpertWeights(plain[:1], plain[1:]))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_four_bit_experts_that_are_not_held_give_zeros() -> None:
    x, logits, held = numbers(33, 64), numbers(33, 5, seed=3), range(1, 3)
    (gate_up, _), (down, _) = (
        grouped_stack(5, 64, 64, 32, minimums=False),
        grouped_stack(5, 64, 32, 32, minimums=False),
    )
    every = ExpertWeights((gate_up,), (down,))
    mine = torch.isin(logits.argmax(dim=1), torch.tensor(held, device=x.device))
    got = experts.moe(x, logits, some_of(every, held))
    assert torch.equal(got, experts.moe(x, logits, every) * mine[:, None])
