"""What a deployment does at each batch size: time per token with and without drafts, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from engine.step.shape import ROOT, TreeShape, chain
from server.planning.acceptance import CHAIN, Acceptance
from server.planning.costs import Cost
from server.planning.memory import MemoryPlan
from server.planning.rounds import Deployment, Parts, round_cost, round_parts

MILLI = 1e-3  # of microseconds
MOST_ROWS = 4096


@dataclass(frozen=True, slots=True)
class BatchPrediction:
    """One batch size. Times in milliseconds; a token's is that of one row."""

    batch: int
    fits: bool  # into the cache, with the given context
    plain_ms: float
    tree: str  # the one with the least time per token; root: no drafts
    round_ms: float
    tokens_per_round: float
    ms_per_token: float
    speedup: float
    tokens_per_second: float  # of all rows
    limit: str
    shares: dict[str, float]  # of the round, by what it waits for


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one deployment."""

    title: str
    context: int
    acceptance: float
    memory: MemoryPlan
    batches: tuple[BatchPrediction, ...]
    parts: Parts  # of the first batch's round

    def as_json(self) -> dict[str, Any]:
        """Numbers only, ready for `json.dumps`."""
        return {
            "title": self.title,
            "context_tokens": self.context,
            "acceptance_chain3": self.acceptance,
            "memory_bytes": self.memory.entries,
            "sequences_of_context": self.memory.num_sequences(self.context),
            "batches": [asdict(batch) for batch in self.batches],
            "parts_us": {name: asdict(cost) for name, cost in self.parts.items()},
        }


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about a deployment."""

    batches: tuple[int, ...]
    context: int  # tokens of every row
    acceptance: Acceptance
    shapes: tuple[TreeShape, ...]  # trees to choose from, besides the root


def predict_batch(
    deployment: Deployment, asked: Question, batch: int, fits: bool
) -> BatchPrediction:
    """The best of the asked trees at one batch size; the root is among them."""
    plain = round_cost(deployment, batch, asked.context, ROOT)
    best: TreeShape = ROOT
    cost = plain
    for shape in asked.shapes if deployment.head is not None else ():
        other = round_cost(deployment, batch, asked.context, shape)
        if _per_token(other, shape, asked) < _per_token(cost, best, asked):
            best, cost = shape, other
    per_token = _per_token(cost, best, asked) * MILLI
    return BatchPrediction(
        batch=batch,
        fits=fits,
        plain_ms=plain.total * MILLI,
        tree=best.name,
        round_ms=cost.total * MILLI,
        tokens_per_round=asked.acceptance.tokens(best),
        ms_per_token=per_token,
        speedup=plain.total * MILLI / per_token,
        tokens_per_second=batch / per_token / MILLI,
        limit=cost.limit,
        shares={name: part / cost.total for name, part in cost.by_limit().items()},
    )


def predict(title: str, deployment: Deployment, memory: MemoryPlan, asked: Question) -> Prediction:
    """All batch sizes, and the parts of a round at the first one."""
    room = memory.num_sequences(asked.context)
    batches = tuple(
        predict_batch(deployment, asked, batch, batch <= room) for batch in asked.batches
    )
    shapes = {shape.name: shape for shape in (ROOT, *asked.shapes)}
    first = batches[0]
    parts = round_parts(deployment, first.batch, asked.context, shapes[first.tree])
    tokens = asked.acceptance.tokens(chain(CHAIN))
    return Prediction(title, asked.context, tokens, memory, batches, parts)


def _per_token(cost: Cost, shape: TreeShape, asked: Question) -> float:
    return cost.total / asked.acceptance.tokens(shape)


def batch_sizes(text: str) -> tuple[int, ...]:
    """`1..128`: the powers of two from 1 to 128, and 128; `1,8,64`: these.

    Raises:
        ValueError: neither, or sizes outside 1 to 4096.
    """
    first, dots, last = text.partition("..")
    numbers = [first, last] if dots else text.split(",")
    if not all(part.strip().isdecimal() for part in numbers):
        raise ValueError(f"--batch {text!r}: give sizes, as 1,8,64, or a range, as 1..128")
    sizes = [int(part) for part in numbers]
    if min(sizes) < 1 or max(sizes) > MOST_ROWS or (dots and sizes[0] > sizes[1]):
        raise ValueError(f"--batch {text!r}: sizes from 1 to {MOST_ROWS}, the smaller one first")
    if dots:
        powers = [2**k for k in range(MOST_ROWS.bit_length()) if sizes[0] < 2**k < sizes[1]]
        sizes = [sizes[0], *powers, sizes[1]]
    return tuple(dict.fromkeys(sizes))


def context_tokens(text: str) -> int:
    """`8k` -> 8192, `1000` -> 1000. ValueError for anything else."""
    digits = text.removesuffix("k")
    if not digits.isdecimal() or int(digits) < 1:
        raise ValueError(f"--context {text!r}: give a number of tokens, as 1000 or 8k")
    return int(digits) * (1024 if digits != text else 1)
