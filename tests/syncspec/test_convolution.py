"""Spectral convolution against its definition, and what it does not depend on."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("scipy", reason="syncspec needs scipy: pip install .[syncspec]")

import numpy as np
import torch

from syncspec.convolution import KERNELS, TERMS, SpectralConvolution
from syncspec.generator import generate
from syncspec.graph import Basis, eigenbasis

NUM_POINTS = 120


def basis_of(num_pairs: int) -> Basis:
    return eigenbasis(generate("table", NUM_POINTS, 2).points, num_pairs)


def tensors(basis: Basis) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(basis.frequencies)[None], torch.tensor(basis.vectors)[None]


def layer(kernel: str = "dilated", channels: int = 3) -> SpectralConvolution:
    torch.manual_seed(0)
    return SpectralConvolution(channels, 2, 16.0, kernel).double()


def functions(channels: int = 3) -> torch.Tensor:
    return torch.randn(1, NUM_POINTS, channels, generator=torch.Generator().manual_seed(1)).double()


def multiplier(w: list[float], f: float, g: float) -> float:
    """The formula, term by term."""
    total = w[0]
    for j in (1, 2, 3):
        wave = w[2 * j - 1] * math.sin(math.pi * j * g * f)
        wave += w[2 * j] * math.cos(math.pi * j * g * f)
        total += math.exp(-j * g * f) * wave
    return total


def brute_force(module: SpectralConvolution, basis: Basis, function: np.ndarray) -> np.ndarray:
    """Phi m(F) Phi^T of dense matrices, a pair of channels at a time. [N, C_out]"""
    constant, waves = (p.detach().numpy() for p in (module.constant, module.waves))
    out = np.zeros((NUM_POINTS, constant.shape[1]))
    for a in range(constant.shape[0]):
        for b in range(constant.shape[1]):
            w = [constant[a, b], *waves[a, :, b]]
            m = np.diag([multiplier(w, f, module.dilation) for f in basis.frequencies])
            out[:, b] += basis.vectors @ m @ basis.vectors.T @ function[:, a]
    return out


def test_all_frequencies_give_the_dense_product() -> None:
    basis, module = basis_of(NUM_POINTS), layer()
    found = module(functions(), *tensors(basis))[0]
    expected = brute_force(module, basis, functions()[0].numpy())
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-10)


def test_lowest_frequencies_are_enough_for_functions_of_them() -> None:
    basis, module = basis_of(30), layer()
    smooth = basis.vectors @ np.random.default_rng(0).normal(size=(30, 3))
    found = module(torch.tensor(smooth)[None], *tensors(basis))[0]
    np.testing.assert_allclose(
        found.detach().numpy(), brute_force(module, basis, smooth), atol=1e-10
    )


def test_a_kernel_has_seven_parameters_for_each_pair_of_channels() -> None:
    assert sum(p.numel() for p in layer().parameters()) == 7 * 3 * 2


def test_polynomial_terms_are_chebyshev_polynomials() -> None:
    f = torch.linspace(0, 2, 9, dtype=torch.float64)
    found = TERMS["polynomial"](f, 1.0).numpy()
    expected = np.polynomial.chebyshev.chebvander(f.numpy() - 1, 6)
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_those_of_finite_differences(kernel: str) -> None:
    frequencies, vectors = tensors(basis_of(12))
    module = layer(kernel)

    def apply(constant: torch.Tensor, waves: torch.Tensor, function: torch.Tensor) -> torch.Tensor:
        weights = {"constant": constant, "waves": waves}
        return torch.func.functional_call(module, weights, (function, frequencies, vectors))

    inputs = [module.constant, module.waves, functions().requires_grad_()]
    assert torch.autograd.gradcheck(apply, [x.detach().requires_grad_() for x in inputs])


def test_signs_order_and_mixtures_of_equal_frequencies_do_not_matter() -> None:
    basis, module = basis_of(20), layer()
    frequencies, vectors = tensors(basis)
    frequencies[0, 5:8] = frequencies[0, 5]  # three vectors of one frequency
    expected = module(functions(), frequencies, vectors)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    signs = torch.where(torch.arange(20) % 2 == 0, 1.0, -1.0).double()
    turn, _ = torch.linalg.qr(torch.randn(3, 3).double())
    mixed = torch.cat([vectors[..., :5], vectors[..., 5:8] @ turn, vectors[..., 8:]], dim=-1)
    for changed in (vectors * signs, mixed):
        torch.testing.assert_close(module(functions(), frequencies, changed), expected)
    shuffled = module(functions(), frequencies[:, order], vectors[..., order])
    torch.testing.assert_close(shuffled, expected)


def test_a_wider_dilation_reaches_farther() -> None:
    basis = eigenbasis(generate("table", 600, 2).points, 100)
    frequencies, vectors = tensors(basis)
    spread = []
    for dilation in (16.0, 256.0):
        wave = TERMS["dilated"](frequencies, dilation)[0, :, 2]  # exp(-gf) cos(pi g f)
        kernel = (vectors[0] * wave) @ vectors[0, 0]  # around point 0
        distance = (torch.tensor(generate("table", 600, 2).points)).sub_(
            torch.tensor(generate("table", 600, 2).points[0])
        )
        mass = kernel.square() / kernel.square().sum()
        spread.append(float((mass * distance.square().sum(-1)).sum()))
    assert spread[0] < spread[1]


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernel is 'wide'.*dilated"):
        SpectralConvolution(1, 1, 4.0, "wide")
