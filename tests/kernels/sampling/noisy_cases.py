"""Rows that rank drafts with every sampling option, for the tests of all backends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.sampling.rank import noisy_reference
from kernels.sampling.settings import DrawSettings

VOCAB = 333
ROUGH = 2e-3  # other backends may be this far from the reference; a draft is only a guess


@dataclass(frozen=True)
class NoisyCase:
    """Rows with other settings each; the first is greedy."""

    logits: Tensor  # [R, VOCAB]
    settings: DrawSettings
    token_ids: Tensor | None

    def expected(self) -> Tensor:
        return noisy_reference.add_noise(self.logits, self.settings, self.token_ids)

    def check(self, got: Tensor) -> None:
        """Values at the border of a bin may be in the next one, so few may differ by OUTSIDE."""
        expected = self.expected()
        sampled = self.settings.temperature > 0
        assert torch.equal(got[~sampled], self.logits[~sampled])
        wrong = ((got - expected).abs() > ROUGH) & (got != expected)  # -inf equals -inf
        assert wrong.float().mean() < 0.002
        assert (wrong <= ((got - expected).abs() - noisy_reference.OUTSIDE).abs().lt(0.1)).all()


def noisy_case(device: torch.device, *, filtered: bool, mapped: bool) -> NoisyCase:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(8, VOCAB, generator=generator) * 3
    logits[3, 40:60] = -torch.inf
    settings = DrawSettings(
        temperature=torch.tensor([0.0, 1.0, 0.7, 1.3, 2.0, 1.0, 0.3, 1.0], device=device),
        seeds=torch.arange(8, device=device) * 12345 - 3,
        positions=torch.arange(8, device=device) + 100,
    )
    if filtered:
        settings = replace(
            settings,
            top_k=torch.tensor([5, VOCAB, 7, VOCAB, 1, 20, VOCAB, 10**6], device=device),
            top_p=torch.tensor([0.5, 0.9, 1.0, 0.7, 1.0, 0.8, 1.0, 1.0], device=device),
            min_p=torch.tensor([0.0, 0.0, 0.0, 0.01, 0.0, 0.05, 0.1, 0.0], device=device),
        )
    ids = torch.randperm(2000, generator=generator)[:VOCAB].to(device) if mapped else None
    return NoisyCase(logits.to(device), settings, ids)
