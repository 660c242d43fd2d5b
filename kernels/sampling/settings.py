"""What sampling operations take and give: how tokens are drawn, changes to logits, scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """The tokens that R rows have seen, and the penalties for them.

    Row r continues the text of line lines[r] after the drafted tokens paths[r]. A row whose three
    penalties are off keeps its logits, whatever the counts of its line.
    """

    counts: Tensor  # [L, V] int32: twice the occurrences in the output, plus 1 if in the prompt
    lines: Tensor  # [R] int64
    paths: Tensor  # [R, D] int64, -1: no token. These tokens count as output
    repetition: Tensor  # [R] float32, 1 is off
    frequency: Tensor  # [R] float32, 0 is off
    presence: Tensor  # [R] float32, 0 is off

    @property
    def active(self) -> Tensor:
        """[R] bool: rows with a penalty that is not off."""
        return (self.repetition != 1) | (self.frequency != 0) | (self.presence != 0)


@dataclass(frozen=True, slots=True)
class BiasEntries:
    """B lists of at most M entries. An entry is a number to add to the logit of one token. A token
    may have two entries: its bias and one that forbids it."""

    lists: Tensor  # [R] int64, which list applies to each row
    ids: Tensor  # [B, M] int64 token ids, -1: no entry
    values: Tensor  # [B, M] float32 to add; -inf forbids the token
    until: Tensor  # [B, M] int64: the entry applies where the drawn token's position is below it


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Changes to the logits of R rows."""

    positions: Tensor  # [R] int64 absolute position of the token to draw
    penalties: Penalties | None = None
    bias: BiasEntries | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of S tokens, and of the best alternatives to each."""

    chosen: Tensor  # [S] float32
    top_ids: Tensor  # [S, n] int64, the best first, the lower id among equals
    top: Tensor  # [S, n] float32


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """How the tokens of R rows are drawn. Settings that no row uses may be None."""

    temperature: Tensor  # [R] float32, 0 is greedy: the highest logit, no noise
    seeds: Tensor  # [R] int64, the bits of the unsigned seed
    positions: Tensor  # [R] int64 absolute position of the token to draw
    top_k: Tensor | None = None  # [R] int64, V when off
    top_p: Tensor | None = None  # [R] float32, 1 when off
    min_p: Tensor | None = None  # [R] float32, 0 when off
    allowed: Tensor | None = None  # [R, ceil(V / 32)] int32, bit v % 32 of word v // 32: token v
    any_sampled: bool = True  # False: all rows are greedy; True: some may not be
    any_greedy: bool = True  # False: no row is greedy; True: some may be

    @property
    def is_filtered(self) -> bool:
        return self.top_k is not None or self.top_p is not None or self.min_p is not None

    def filters(self, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """top_k [R] int64, top_p and min_p [R] float32, also where none was given."""
        top_k, top_p, min_p = self.top_k, self.top_p, self.min_p
        return (
            torch.full_like(self.seeds, vocab_size) if top_k is None else top_k,
            torch.full_like(self.temperature, 1.0) if top_p is None else top_p,
            torch.full_like(self.temperature, 0.0) if min_p is None else min_p,
        )
