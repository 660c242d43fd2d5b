"""From logits to one token per row, with every sampling option of a request, in plain torch.

Two operations follow each other. `edit_logits`: repetition penalty, frequency and presence
penalties, bias. `draw`: grammar mask, temperature, then top-k, top-p (over the tokens that top-k
kept) and min-p, then the arg-max after adding the noise of (seed, position). A third, `score`,
gives log-probabilities of tokens under the raw logits.
Every filter is a threshold on the scaled logits of its row. Tokens that tie with the last one kept
are kept too, so a token t is drawn only if

    fewer than top_k tokens lie strictly above t, and
    the mass strictly above t is below top_p of the mass of the best top_k tokens, and
    t >= highest + log(min_p).

No function here waits for the device: no shape depends on values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.sampling.reference import gumbel_argmax, logsumexp, noise_keys


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


def edit_logits(logits: Tensor, edits: LogitEdits) -> Tensor:
    """The logits [R, V] float32 after penalties and bias: a changed copy."""
    penalties, bias = edits.penalties, edits.bias
    edited = logits.clone() if penalties is None else _penalise(logits, penalties)
    return edited if bias is None else _add_bias(edited, edits.positions, bias)


def _penalise(logits: Tensor, penalties: Penalties) -> Tensor:
    used = penalties.paths >= 0
    drafted = torch.where(used, penalties.paths, 0)
    seen = penalties.counts[penalties.lines].scatter_add(1, drafted, 2 * used.int())  # [R, V]
    strengths = penalties.repetition, penalties.frequency, penalties.presence
    values = penalised(logits, seen >> 1, *(part[:, None] for part in strengths))
    return torch.where(penalties.active[:, None] & (seen > 0), values, logits)


def penalised(
    raw: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """Penalised logits of tokens that were seen, `counts` times in the output.

    Repetition (arXiv:1909.05858) counts prompt and output. Frequency and presence count the output,
    as the OpenAI API defines them: subtract count * frequency + (count > 0) * presence."""
    values = torch.where(raw > 0, raw / repetition, raw * repetition)
    values = values - counts * frequency
    return values - (counts > 0) * presence


def _add_bias(edited: Tensor, positions: Tensor, bias: BiasEntries) -> Tensor:
    ids = bias.ids[bias.lists]  # [R, M]
    applies = (ids >= 0) & (positions[:, None] < bias.until[bias.lists])
    # Entries that do not apply add -0.0 to token 0, which changes no number.
    values = torch.where(applies, bias.values[bias.lists], -0.0)
    return edited.scatter_add(1, torch.where(applies, ids, 0), values)


def score(logits: Tensor, tokens: Tensor, num_top: int) -> Scores:
    """Log-probabilities of `tokens` [S] and of the `num_top` best tokens under the raw `logits`
    [S, V] float32, that is, before any edit and temperature."""
    return scores_of(logits, tokens, logsumexp(logits), best_tokens(logits, num_top))


def scores_of(logits: Tensor, tokens: Tensor, normaliser: Tensor, top_ids: Tensor) -> Scores:
    """As `score`, given log(sum(exp(logits))) [S] and the best tokens [S, n]."""
    chosen = logits.gather(1, tokens[:, None])[:, 0] - normaliser
    return Scores(chosen, top_ids, logits.gather(1, top_ids) - normaliser[:, None])


def best_tokens(logits: Tensor, count: int) -> Tensor:
    """[S, V] -> [S, count] int64 ids, the best first, the lower id among equals.

    `topk` may take any of equal values, so it gets integers that order by value, then by lower id.
    """
    S, V = logits.shape
    if count == 0:
        return torch.empty(S, 0, dtype=torch.int64, device=logits.device)
    bits = torch.where(logits == 0, 0.0, logits).view(torch.int32)  # no -0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # int32 in the order of the floats
    lower_first = torch.arange(V - 1, -1, -1, device=logits.device)
    return ((order.long() << 32) | lower_first).topk(count, dim=1).indices


def draw(logits: Tensor, settings: DrawSettings) -> Tensor:
    """One token per row of edited logits [R, V] float32, [R] int64: the best token of a greedy row,
    a random draw for other rows. The logits stay unchanged."""
    logits = masked(logits, settings.allowed)
    sampled = settings.temperature > 0
    scaled = logits / torch.where(sampled, settings.temperature, 1.0)[:, None]
    keys = noise_keys(settings.seeds, settings.positions)
    drawn = gumbel_argmax(keep(scaled, settings), keys)
    return torch.where(sampled, drawn, logits.argmax(dim=1))


def masked(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """The logits, with -inf for tokens that a grammar mask forbids; unchanged without a mask."""
    if allowed is None:
        return logits
    return logits.masked_fill(_bits(~allowed)[:, : logits.shape[1]], -torch.inf)


def are_allowed(tokens: Tensor, allowed: Tensor) -> Tensor:
    """Whether a mask allows each row's token, [R] bool; `allowed` as `DrawSettings.allowed`."""
    tokens = tokens.clamp(min=0)
    words = allowed.gather(1, (tokens >> 5)[:, None])[:, 0]
    return (words >> (tokens & 31)) & 1 == 1


def _bits(words: Tensor) -> Tensor:
    """[R, W] int32 -> [R, 32 * W] bool, the lowest bit of each word first."""
    if words.device.type == "cpu":  # five times as fast as shifts
        packed = words.contiguous().numpy().view(np.uint8)
        return torch.from_numpy(np.unpackbits(packed, axis=1, bitorder="little").view(np.bool_))
    order = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> order) & 1 == 1).flatten(1)


def keep(scaled: Tensor, settings: DrawSettings) -> Tensor:
    """Set everything outside top-k, top-p and min-p to -inf; `scaled` [R, V] after temperature.
    Masses are summed in float64."""
    R, V = scaled.shape
    ordered = scaled.sort(dim=1, descending=True).values
    threshold = torch.full_like(ordered[:, :1], -torch.inf)  # [R, 1]
    top_k = torch.full((R,), V, device=scaled.device) if settings.top_k is None else settings.top_k
    if settings.top_k is not None:
        threshold = ordered.gather(1, (top_k.clamp(max=V) - 1)[:, None])
    if settings.top_p is not None:
        mass = (ordered - ordered[:, :1]).double().exp()
        mass = mass.masked_fill(torch.arange(V, device=scaled.device) >= top_k[:, None], 0.0)
        upto = mass.cumsum(dim=1)
        reached = upto >= settings.top_p.double()[:, None] * upto[:, -1:]
        lowest = ordered.gather(1, reached.int().argmax(dim=1, keepdim=True))
        lowest = lowest.masked_fill((settings.top_p >= 1)[:, None], -torch.inf)
        threshold = torch.maximum(threshold, lowest)
    if settings.min_p is not None:
        threshold = torch.maximum(threshold, ordered[:, :1] + settings.min_p.log()[:, None])
    return scaled.masked_fill(scaled < threshold, -torch.inf)
