"""A proposer that knows the texts in advance, and checks all inputs that it gets.

With a given probability, it puts the true token among the children of a true node; all other nodes
are random, with the end of text and copies of siblings among them. Its choices depend only on its
seed, the row's seed and the position.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drafter.pending import joined
from engine.speculation.planner import Candidate, Choice
from engine.speculation.proposer import Committed, Drafted, DraftLimits, Roots, Singles
from engine.step.batch import FeatureTap
from engine.step.plan import StepOutcome, StepPlan
from engine.step.shape import (
    MAX_NODES,
    DynamicShape,
    StaticShape,
    TreeShape,
    ancestors_of,
    chain,
    depths_of,
    signed,
)
from engine.step.tree import DraftTree

BLOCK = 16
TOLERANCE = 2e-3  # of hidden states after the final norm, against a plain forward


def random_parents(num_nodes: int, rng: random.Random, max_depth: int = MAX_NODES) -> list[int]:
    """Parents of a random tree, every node within `max_depth`."""
    parents, depths = [-1], [0]
    for node in range(1, num_nodes):
        parent = rng.choice([p for p in range(node) if depths[p] < max_depth])
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return parents


def tree_of(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> DraftTree:
    """Trees from the (parents, tokens) of each row."""
    width = max(len(parents) for parents, _ in rows)

    def spread(values: Sequence[int], unused: int) -> list[int]:
        return [*values, *[unused] * (width - len(values))]

    depths = [depths_of(parents) for parents, _ in rows]
    masks = [[signed(mask) for mask in ancestors_of(parents)] for parents, _ in rows]
    return DraftTree(
        tokens=torch.tensor([spread(tokens, -1) for _, tokens in rows]),
        parents=torch.tensor([spread(parents, -1) for parents, _ in rows]),
        depths=torch.tensor([spread(values, 0) for values in depths]),
        ancestors=torch.tensor([spread(values, 0) for values in masks]),
        sizes=torch.tensor([len(parents) for parents, _ in rows]),
        max_depth=max(max(values) for values in depths),
    )


@dataclass(frozen=True)
class Script:
    """The known future of a request: all its tokens, and where cheap the hidden states of a plain
    forward over them, [len, H]."""

    token_ids: Sequence[int]  # prompt + output
    hidden: Tensor | None = None


@dataclass
class Line:
    """What a line has received since its sequence began."""

    first: int | None = None  # position of the first entry
    tokens: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    num_checked: int = 0

    @property
    def end(self) -> int | None:
        """Position after the last entry."""
        return None if self.first is None else self.first + len(self.tokens)


@dataclass
class ScriptedProposer:
    """Implements `Proposer`. Rows are identified by their seeds, which must differ."""

    scripts: Mapping[int, Script]  # seed -> script
    acceptance: float
    vocab_size: int
    max_len: int
    eos: int = 2
    whims: bool = False  # sometimes a smaller tree than requested, or only the root
    seed: int = 0
    lookahead = 1
    tap: FeatureTap | None = None
    lines: dict[int, Line] = field(default_factory=dict)
    num_entries: int = 0
    failed: bool = False

    def release(self, lines: Sequence[int]) -> None:
        """Nothing is deferred."""

    def admit(self, lines: Sequence[int]) -> None:
        self.lines |= {line: Line() for line in lines}

    def draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:
        assert limits.exact
        rows = zip(
            roots.lines.tolist(),
            roots.tokens.tolist(),
            roots.positions.tolist(),
            roots.max_nodes.tolist(),
            roots.seeds.tolist(),
            strict=True,
        )
        trees = []
        for at, (number, token, position, limit, bits) in enumerate(rows):
            line = self.lines[number]
            script = self.scripts.get(bits % 2**64, Script(()))
            self._check_line(line, script, token, position, limit)
            last_slot = roots.block_tables.shape[1] * BLOCK - 1
            assert position + limit - 1 <= min(last_slot, self.max_len - 1), f"row {at}"
            assert position + limit - 1 < limits.max_context, f"row {at}"
            trees.append(self._tree(script, position, bits, limit, shape, token))
        return Drafted(tree_of(trees), torch.zeros(len(trees), dtype=torch.bool))

    def take(self, committed: Committed, hidden: Tensor) -> None:
        cu = committed.cu.tolist()
        assert cu[0] == 0
        assert cu[-1] == len(committed.tokens)
        assert len(set(committed.slots.tolist())) == cu[-1], "two entries share a slot"
        assert len(set(committed.features.tolist())) == cu[-1], "two entries share a feature"
        self._check_slots(committed)
        for row, number in enumerate(committed.lines.tolist()):
            part = slice(cu[row], cu[row + 1])
            positions = committed.positions[part].tolist()
            if not positions:
                continue
            line = self.lines[number]
            if line.first is None:
                assert positions[0] == 1 or positions[0] % BLOCK == 0, "more than one token again"
                line.first = positions[0]
            assert positions == list(range(line.end or 0, (line.end or 0) + len(positions)))
            assert positions[-1] < min(self.max_len, committed.max_context)
            assert len(positions) <= committed.max_entries
            line.tokens += committed.tokens[part].tolist()
            line.hidden += list(hidden[committed.features[part]])
            self.num_entries += len(positions)

    def take_singles(self, singles: Singles, hidden: Tensor) -> None:
        part = joined([(singles, (hidden,))], BLOCK)
        if part is not None:
            self.take(part.committed, part.features[0])

    def _check_slots(self, committed: Committed) -> None:
        rows = torch.repeat_interleave(committed.cu.diff().long())
        blocks = committed.block_tables[rows, committed.positions // BLOCK].long()
        assert torch.equal(committed.slots, blocks * BLOCK + committed.positions % BLOCK)

    def _check_line(
        self, line: Line, script: Script, token: int, position: int, limit: int
    ) -> None:
        """Assert that all entries up to the root came exactly once and match the request."""
        if line.end != position + 1:  # the rest of a prompt is computed in this very step
            assert line.end is None or line.end <= position
            assert limit == 1
        else:
            assert line.tokens[-1] == token
        if not script.token_ids or line.first is None:
            return
        first = line.first
        assert line.tokens == list(script.token_ids[first : first + len(line.tokens)])
        if script.hidden is not None:
            seen = torch.stack(line.hidden[line.num_checked :])
            at = first - 1 + line.num_checked
            difference = (seen - script.hidden[at : at + len(seen)]).abs().max()
            assert difference < TOLERANCE, f"wrong feature near position {at}"
        line.num_checked = len(line.hidden)

    def _tree(
        self, script: Script, position: int, bits: int, limit: int, shape: TreeShape, root: int
    ) -> tuple[list[int], list[int]]:
        rng = random.Random(f"{self.seed}/{bits}/{position}")
        size = min(limit, shape.num_nodes)
        if self.whims and rng.random() < 0.3:
            size = rng.choice([1, rng.randint(1, size)])
        if isinstance(shape, StaticShape):
            parents = list(shape.parents[:size])
        else:
            parents = random_parents(size, rng, shape.max_depth)
        return parents, self._tokens(script.token_ids, position, parents, rng, root)

    def _tokens(
        self,
        text: Sequence[int],
        position: int,
        parents: Sequence[int],
        rng: random.Random,
        root: int,
    ) -> list[int]:
        depths = depths_of(parents)
        tokens = [self._random_token(rng) for _ in parents]
        tokens[0] = root
        true = [True, *[False] * (len(parents) - 1)]
        for node in range(len(parents)):
            children = [child for child, parent in enumerate(parents) if parent == node]
            if len(children) > 1 and rng.random() < 0.3:
                tokens[children[-1]] = tokens[children[0]]
            at = position + depths[node] + 1
            if not true[node] or not children or at >= len(text):
                continue
            if rng.random() < self.acceptance:
                tokens[rng.choice(children)] = text[at]
            for child in children:
                true[child] = tokens[child] == text[at]
        return tokens

    def _random_token(self, rng: random.Random) -> int:
        return self.eos if rng.random() < 0.1 else rng.randrange(self.vocab_size)


@dataclass
class CyclingPlanner:
    """A planner with another shape at every step."""

    shapes: Sequence[TreeShape]
    num_steps: int = 0

    def choose(self, rows: Sequence[Candidate]) -> Choice:
        self.num_steps += 1
        return Choice(self.shapes[self.num_steps % len(self.shapes)])

    def observe(self, plan: StepPlan, outcome: StepOutcome, seconds: float | None) -> None:
        """Acceptance does not change the shapes."""


def random_shape(num_nodes: int, seed: int = 0, max_depth: int = 7) -> StaticShape:
    """A static tree with its nodes in a random order, parents first."""
    parents = random_parents(num_nodes, random.Random(seed), max_depth)
    return StaticShape(f"random{num_nodes}", tuple(parents))


def wide_shape(*widths: int) -> StaticShape:
    """`widths[d]` children for every node of depth d, level by level."""
    parents, level = [-1], [0]
    for width in widths:
        parents += [node for node in level for _ in range(width)]
        level = list(range(len(parents) - len(level) * width, len(parents)))
    return StaticShape("wide" + "x".join(map(str, widths)), tuple(parents))


CHAINS = tuple(chain(length) for length in range(1, 8))
TREES = (
    wide_shape(3),
    wide_shape(2, 2),
    random_shape(8),
    wide_shape(3, 2, 1),
    random_shape(26, seed=1),
    random_shape(60, seed=2),
    random_shape(64, seed=3, max_depth=12),
)
DYNAMIC = (DynamicShape("dynamic9", 9, 3, 4), DynamicShape("dynamic60", 60, 7, 10))
