"""What the sampler knows on the host: running requests, and the nodes that draw a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.request import Request, SamplingParams
from engine.sampling.history import TokenHistory
from engine.step.tree import DraftTree

COLDEST = 1e-5  # the lowest temperature that is told from greedy


@dataclass(slots=True)
class RowState:
    """What the sampler remembers of a running request."""

    request: Request
    num_output: int
    history: TokenHistory | None  # only for penalised requests

    @classmethod
    def admit(cls, request: Request, output_ids: Sequence[int]) -> RowState:
        penalised = is_penalised(request.params)
        history = TokenHistory(request.prompt_ids, output_ids) if penalised else None
        return cls(request, len(output_ids), history)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take in tokens committed to the output."""
        self.num_output += len(token_ids)
        if self.history is not None:
            self.history.extend(token_ids)


def effective_temperature(params: SamplingParams) -> float:
    """0 (greedy) below COLDEST: dividing by less would overflow float32."""
    return params.temperature if params.temperature >= COLDEST else 0.0


def unsigned_bits(seeds: Sequence[int]) -> NDArray[np.int64]:
    """Unsigned seeds as tensors hold them."""
    return np.array(seeds, dtype=np.uint64).view(np.int64)


def is_penalised(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


@dataclass(frozen=True, slots=True)
class Nodes:
    """The tree nodes that draw a token, R of them, as host arrays."""

    tree_of: NDArray[np.int64]  # [R] which row
    depth: NDArray[np.int64]  # [R]
    path: Callable[[int], tuple[int, ...]]  # of node r: the tokens from below the root down to it

    @classmethod
    def of(cls, tree: DraftTree) -> Nodes:
        sizes = tree.sizes.numpy()
        tree_of = np.repeat(np.arange(len(sizes)), sizes)
        firsts = np.cumsum(sizes) - sizes
        node_of = np.arange(len(tree_of)) - firsts[tree_of]
        tokens, parents = tree.tokens.numpy(), tree.parents.numpy()

        def path(r: int) -> tuple[int, ...]:
            row, node = int(tree_of[r]), int(node_of[r])
            found: list[int] = []
            while node > 0:
                found.append(int(tokens[row, node]))
                node = int(parents[row, node])
            return tuple(reversed(found))

        return cls(tree_of, tree.depths.numpy()[tree_of, node_of], path)
