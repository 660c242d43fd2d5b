"""Experts on the CPU: as the reference, also quantised, and no bit depends on the batch."""

from __future__ import annotations

import pytest
import torch

from engine.models.weights import WeightPacker
from kernels.moe import reference
from kernels.ops import ExpertWeights, LinearWeight, Ops
from tests.kernels.native.test_native import TOLERANCE, numbers

E, H, F, CPU = 5, 96, 64, torch.device("cpu")


def stacked(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = numbers(E, H, 2 * F, seed=1, dtype=dtype) / H**0.5
    return gate_up, numbers(E, F, H, seed=2, dtype=dtype) / F**0.5


def packed(native: Ops, dtype: torch.dtype, form: str = "plain") -> ExpertWeights:
    packer = WeightPacker(native, dtype, CPU, form)  # type: ignore[arg-type]
    experts = ([[weight.T] for weight in part] for part in stacked(dtype))
    return ExpertWeights(*(packer.pack_experts(parts, E) for parts in experts))


def expected(x: torch.Tensor, logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    gate_up, down = stacked(dtype)
    weights = ExpertWeights(
        (LinearWeight(gate_up, None, 2 * F, H),), (LinearWeight(down, None, H, F),)
    )
    return reference.moe(x, logits, weights)


def test_experts_equal_the_reference(native: Ops, dtype: torch.dtype) -> None:
    x, logits = numbers(23, H), numbers(23, E, seed=3)
    logits[:, 2] = -9.0  # gets no token
    rounds = native.backends["moe"].reason is not None
    tolerance = 2e-2 if rounds else TOLERANCE["linear"]
    got = native.moe(x, logits, packed(native, dtype))
    torch.testing.assert_close(got, expected(x, logits, dtype), atol=tolerance, rtol=0)


def test_the_first_of_equal_logits_is_chosen(native: Ops) -> None:
    x, logits = numbers(2, H), torch.tensor([[1.0] * E, [0.0, 2.0, 2.0, 0.0, 1.0]])
    apart = logits - torch.arange(E) / 1024
    weights = packed(native, torch.float32)
    got, wanted = (native.moe(x, each, weights) for each in (logits, apart))
    torch.testing.assert_close(got, wanted, atol=2e-2, rtol=0)


@pytest.mark.parametrize("form", ["plain", "q8"])
def test_a_token_is_the_same_in_every_company(native: Ops, dtype: torch.dtype, form: str) -> None:
    x, logits, weights = numbers(40, H), numbers(40, E, seed=3), packed(native, dtype, form)
    alone = torch.cat([native.moe(x[t : t + 1], logits[t : t + 1], weights) for t in range(40)])
    for some in (slice(0, 40), slice(3, 20), slice(7, 9)):
        assert torch.equal(native.moe(x[some], logits[some], weights), alone[some])


@pytest.mark.parametrize("held", [range(2), range(2, E)])
def test_tokens_of_experts_that_are_not_held_get_zeros(native: Ops, held: range) -> None:
    x, logits, weights = numbers(23, H), numbers(23, E, seed=3), packed(native, torch.float32)
    own = slice(held.start, held.stop)
    part = ExpertWeights(weights.gate_up[own], weights.down[own], held)
    mine = torch.isin(logits.argmax(dim=1), torch.tensor(held))
    assert torch.equal(native.moe(x, logits, part), native.moe(x, logits, weights) * mine[:, None])


def test_quantised_experts_are_near_the_plain_ones(native: Ops, dtype: torch.dtype) -> None:
    x, logits = numbers(9, H), numbers(9, E, seed=3)
    weights = packed(native, dtype, "q8")
    assert all(part.layout is not None for part in (*weights.gate_up, *weights.down))
    got = native.moe(x, logits, weights)
    torch.testing.assert_close(got, expected(x, logits, dtype), atol=5e-2, rtol=0)
