"""How often drafts are the token that the target draws at temperature 1, with the operations that
serve: both know the noise of a position (kernels/sampling/rank/noisy_reference.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import Ops
from kernels.sampling.settings import DrawSettings

ROWS = {"cpu": 128, "cuda": 2048}  # of logits at a time
MOST_TOKENS = 1 << 20  # ids are below this


@dataclass(frozen=True, slots=True)
class TargetDraws:
    """What the target draws at M places, and how."""

    settings: DrawSettings  # of M rows
    tokens: Tensor  # [M] int64


@dataclass(frozen=True, slots=True)
class SampledDrafts:
    """Draws of a target, and whether a head's best guesses are these tokens."""

    ops: Ops
    head: Tensor  # [V, H] the target's LM head
    target_ids: Tensor  # [Vd] int64 the draft vocabulary
    dtype: torch.dtype  # of matrix products

    def draws(self, hidden: Tensor, token_ids: Tensor, positions: Tensor) -> TargetDraws:
        """At M places with the target's state `hidden` [M, H], the token `token_ids` [M] and this
        position in their text, [M]. The noise depends on the last two alone, so it does not matter
        how texts are put together."""
        ones = torch.ones(len(hidden), device=hidden.device)
        seeds = token_ids + MOST_TOKENS * positions
        settings = DrawSettings(ones, seeds, positions + 1, any_greedy=False)
        head = self.head.to(hidden.device, self.dtype)
        return TargetDraws(settings, self._best(hidden, head, settings, self.ops.draw))

    def are_right(self, draws: TargetDraws, rows: Tensor, inputs: Tensor, head: Tensor) -> Tensor:
        """[N] bool: whether the best guess from `inputs` [N, H] and the head's rows `head` [Vd, H]
        is what the target draws at the place `rows` [N]."""

        def guess(logits: Tensor, settings: DrawSettings) -> Tensor:
            noisy = self.ops.add_noise(logits, settings, self.target_ids)
            return noisy.argmax(dim=1)

        settings = _of_rows(draws.settings, rows)
        best = self._best(inputs, head.to(self.dtype), settings, guess)
        return self.target_ids[best] == draws.tokens[rows]

    def _best(
        self,
        states: Tensor,
        head: Tensor,
        settings: DrawSettings,
        choose: Callable[[Tensor, DrawSettings], Tensor],
    ) -> Tensor:
        """[N] int64. The logits of all rows never exist at once."""
        size = ROWS[states.device.type]
        best = torch.empty(len(states), dtype=torch.int64, device=states.device)
        for first in range(0, len(states), size):
            part = slice(first, first + size)
            logits = (states[part].to(self.dtype) @ head.T).float()
            best[part] = choose(logits, _of_rows(settings, part))
        return best


def _of_rows(settings: DrawSettings, rows: Tensor | slice) -> DrawSettings:
    return DrawSettings(
        settings.temperature[rows], settings.seeds[rows], settings.positions[rows], any_greedy=False
    )
