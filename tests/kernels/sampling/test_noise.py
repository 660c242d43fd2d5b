"""The noise integers must never change and must be the same on every machine."""

from __future__ import annotations

import torch

from kernels.sampling.reference import gumbel, noise_bits, noise_keys

MASK64 = (1 << 64) - 1


def mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def fmix32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def expected_bits(seed: int, position: int, token: int) -> int:
    golden = 0x9E3779B97F4A7C15
    key = mix64((mix64((seed + golden) & MASK64) + (position + 1) * golden) & MASK64)
    word = fmix32((token * 0x9E3779B1 + key) & 0xFFFFFFFF)
    return fmix32(word ^ (key >> 32))


def test_bits_equal_the_definition_in_unbounded_integers() -> None:
    cases = [(0, 0), (1, 0), (0, 1), (2**63, 77), (2**64 - 1, 131071), (12345, 8191)]
    seeds = torch.tensor([seed - (1 << 64) if seed >> 63 else seed for seed, _ in cases])
    keys = noise_keys(seeds, torch.tensor([position for _, position in cases]))
    bits = noise_bits(keys, torch.arange(5000))
    for row, (seed, position) in enumerate(cases):
        for token in (0, 1, 2, 999, 4999):
            assert bits[row, token].item() == expected_bits(seed, position, token)


def test_known_values_never_change() -> None:
    keys = noise_keys(torch.tensor([42]), torch.tensor([7]))
    assert int(keys[0]) & MASK64 == 0xBC16A3D4CC48678E
    assert noise_bits(keys, torch.arange(4)).tolist() == [
        [4004292770, 698433156, 4214353466, 3892335082]
    ]


def test_extreme_bits_give_finite_noise() -> None:
    noise = gumbel(torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1]))
    assert noise.isfinite().all()
    assert (noise.diff() <= 0).all()


def test_noise_has_the_moments_of_gumbel() -> None:
    keys = noise_keys(torch.arange(200), torch.zeros(200, dtype=torch.int64))
    noise = gumbel(noise_bits(keys, torch.arange(5000))).double()
    assert abs(noise.mean().item() - 0.5772157) < 0.005
    assert abs(noise.var().item() - 1.644934) < 0.01


def drawn_share(probability: float) -> float:
    """How often a token is drawn beside one that has the rest of the mass, relative to its
    probability: the law of this noise, summed over its integers. Both wait exponentially long, and
    the rare token wins if it waits less than `probability` times as long as the other."""
    waits = (-gumbel(torch.arange(4000)).double()).exp()  # of the rare token, the shortest first
    longest = (-gumbel(torch.tensor([2**32 - 1])).double()).exp()  # of the other
    wins = torch.where(waits < probability * longest, (-waits / probability).exp(), 0.0)
    return float(wins.sum()) / 2**32 / probability


def test_the_tail_of_the_noise_ends_where_the_documentation_says() -> None:
    assert drawn_share(6.9e-12) == 0
    assert drawn_share(7.1e-12) > 0
    assert abs(drawn_share(1e-10) - 0.81) < 0.01
    assert abs(drawn_share(1e-9) - 1) < 0.01
    assert abs(drawn_share(1e-8) - 1) < 1e-3
