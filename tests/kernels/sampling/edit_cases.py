"""Random penalties and biases, and the logits that they give, computed one token at a time.

The expected logits come from texts, not from the tensors: prompt, output and drafted path of every
row. Each step of the arithmetic is in numpy's float32.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels.sampling.settings import BiasEntries, LogitEdits, Penalties

STRENGTHS = (  # repetition, frequency, presence
    (1.3, 0.4, 0.7),
    (1.0, 0.0, 0.0),
    (0.8, 0.0, 0.0),
    (1.0, -0.3, 0.1),
    (1.0, 0.0, -1.5),
)
NUM_ROWS = 11
NUM_LINES = 5  # the last one holds garbage; only rows without penalties use it
LATE = 2**62


@dataclass(frozen=True)
class Entry:
    token: int
    value: float
    until: int


@dataclass(frozen=True)
class Case:
    """Rows with logits, the tokens that each row's text has seen, and its bias list."""

    logits: Tensor  # [R, V]
    edits: LogitEdits
    prompts: list[list[int]]  # of each row
    outputs: list[list[int]]  # of each row, the drafted path included
    entries: list[list[Entry]]  # of each row

    def expected(self, penalise: bool = True, bias: bool = True) -> Tensor:
        """[R, V]."""
        rows = []
        for row in range(len(self.logits)):
            values = self.logits[row].numpy().copy()
            if penalise:
                self._penalise(row, values)
            if bias:
                self._add_bias(row, values)
            rows.append(torch.from_numpy(values))
        return torch.stack(rows)

    def _penalise(self, row: int, values: np.ndarray) -> None:
        repetition, frequency, presence = (np.float32(part) for part in strengths_of(row))
        prompt, output = self.prompts[row], self.outputs[row]
        for token in {*prompt, *output}:
            count = output.count(token)
            value = values[token]
            value = value / repetition if value > 0 else value * repetition
            value = value - np.float32(count) * frequency
            values[token] = value - (presence if count else np.float32(0))

    def _add_bias(self, row: int, values: np.ndarray) -> None:
        position = int(self.edits.positions[row])
        for entry in self.entries[row]:
            if position < entry.until:
                values[entry.token] += np.float32(entry.value)

    def parts(self) -> list[tuple[LogitEdits, Tensor]]:
        """All edits, each kind alone, and none, with the expected logits."""
        edits = self.edits
        return [
            (edits, self.expected()),
            (replace(edits, bias=None), self.expected(bias=False)),
            (replace(edits, penalties=None), self.expected(penalise=False)),
            (LogitEdits(edits.positions), self.logits),
        ]


def strengths_of(row: int) -> tuple[float, float, float]:
    return STRENGTHS[row % len(STRENGTHS)]


def random_case(vocab: int, depth: int, num_entries: int, seed: int = 0) -> Case:
    """`depth` is the longest path, `num_entries` the longest bias list. Texts repeat tokens; paths
    have gaps; a list may name a token twice, once to forbid it."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(NUM_ROWS, vocab, generator=generator) * 4).round(decimals=1)
    logits[rng.randrange(NUM_ROWS), :: rng.randint(1, 5)] = -torch.inf
    logits[0, vocab // 2] = -0.0

    def text(length: int) -> list[int]:
        return [rng.randrange(max(1, vocab // 2)) for _ in range(rng.randint(0, length))]

    texts = [(text(40), text(25)) for _ in range(NUM_LINES - 1)]
    off = [strengths_of(row) == (1.0, 0.0, 0.0) for row in range(NUM_ROWS)]
    lines = [NUM_LINES - 1 if off[r] else rng.randrange(NUM_LINES - 1) for r in range(NUM_ROWS)]
    paths = [[rng.choice((-1, rng.randrange(vocab))) for _ in range(depth)] for _ in lines]
    for path in paths[::2]:
        path[1:] = path[:1] * (depth - 1) if path else []  # the same token repeated
    positions = [rng.randrange(1000) for _ in lines]
    lists = [_random_list(vocab, num_entries, positions, rng) for _ in range(4)]
    of_row = [rng.randrange(len(lists)) for _ in lines]
    seen = [([], []) if off[r] else texts[line] for r, line in enumerate(lines)]
    return Case(
        logits=logits,
        edits=LogitEdits(
            positions=torch.tensor(positions),
            penalties=Penalties(
                _counts(texts, vocab),
                torch.tensor(lines),
                torch.tensor(paths, dtype=torch.int64).view(NUM_ROWS, depth),
                *torch.tensor([strengths_of(r) for r in range(NUM_ROWS)]).T.contiguous(),
            ),
            bias=_tensors(lists, of_row, num_entries),
        ),
        prompts=[prompt for prompt, _ in seen],
        outputs=[
            [] if off[r] else output + [token for token in paths[r] if token >= 0]
            for r, (_, output) in enumerate(seen)
        ],
        entries=[lists[at] for at in of_row],
    )


def _random_list(vocab: int, longest: int, positions: list[int], rng: random.Random) -> list[Entry]:
    """At most one bias and one ban for each token; some end at the position of a row."""

    def until() -> int:
        return rng.choice((LATE, LATE, 0, rng.choice(positions), rng.choice(positions) + 1))

    tokens = rng.sample(range(vocab), min(vocab, rng.randint(0, longest)))
    found = [Entry(token, rng.uniform(-5, 5), until()) for token in tokens]
    found += [Entry(token, -float("inf"), until()) for token in tokens[::3]]
    rng.shuffle(found)
    return found[:longest]


def _counts(texts: list[tuple[list[int], list[int]]], vocab: int) -> Tensor:
    counts = torch.zeros(NUM_LINES, vocab, dtype=torch.int32)
    counts[-1] = -(2**31) + torch.arange(vocab) * 12345
    for line, (prompt, output) in enumerate(texts):
        for token in output:
            counts[line, token] += 2
        for token in set(prompt):
            counts[line, token] += 1
    return counts


def _tensors(lists: list[list[Entry]], of_row: list[int], longest: int) -> BiasEntries:
    """Unused places hold values that must not be read."""
    ids = torch.full((len(lists), longest), -1)
    values = torch.full((len(lists), longest), torch.nan)
    until = torch.full((len(lists), longest), LATE)
    for at, entries in enumerate(lists):
        first = longest - len(entries)  # unused places come first
        for place, entry in enumerate(entries, first):
            ids[at, place], until[at, place] = entry.token, entry.until
            values[at, place] = entry.value
    return BiasEntries(torch.tensor(of_row), ids, values, until)


def moved(edits: LogitEdits, device: torch.device) -> LogitEdits:
    """The same on another device."""
    penalties, bias = edits.penalties, edits.bias
    return LogitEdits(
        edits.positions.to(device),
        None
        if penalties is None
        else Penalties(
            penalties.counts.to(device),
            penalties.lines.to(device),
            penalties.paths.to(device),
            penalties.repetition.to(device),
            penalties.frequency.to(device),
            penalties.presence.to(device),
        ),
        None
        if bias is None
        else BiasEntries(
            bias.lists.to(device),
            bias.ids.to(device),
            bias.values.to(device),
            bias.until.to(device),
        ),
    )
