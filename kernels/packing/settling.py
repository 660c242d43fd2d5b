"""What `Ops.settle` takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DrawnTrees:
    """The trees of B rows whose only own token is their root, the tokens that the target drew at
    their R packed nodes, and the state of all L lines, which takes the roots of the next step."""

    tokens: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int64, -1 for the root and for unused nodes
    sizes: Tensor  # [B] int64
    faults: Tensor  # [B] bool, only passed on
    drawn: Tensor  # [R] int64, -1: none
    at: Tensor  # [B, N] int64, the place of each node among the R
    inside: Tensor  # [B, N] bool, the row has this node
    slots: Tensor  # [R] int64, where the KV of each node is
    lines: Tensor  # [B] int64
    starts: Tensor  # [B] int64, position of the root
    lens: Tensor  # [B] int64, own tokens: 1, or 0 for padding rows
    line_tokens: Tensor  # [L] int64, changed in place
    line_positions: Tensor  # [L] int64, changed in place
    max_depth: int  # no node lies deeper
    first_scratch: int  # slot


class Report(NamedTuple):
    """What the host hears of the trees."""

    emitted: Tensor  # [B, E] int64
    path: Tensor  # [B, E] int64
    sizes: Tensor  # [B] int64
    tree_tokens: Tensor  # [B, N] int64
    tree_parents: Tensor  # [B, N] int64
    faults: Tensor  # [B] bool


@dataclass(frozen=True, slots=True)
class SettledTrees:
    """The walk down each tree (`Ops.tree_walk`), and which KV moves. E is max_depth + 1."""

    path: Tensor  # [B, E] int64
    num_accepted: Tensor  # [B] int64
    emitted: Tensor  # [B, E] int64
    # [B * max_depth] int64: the slot of each accepted node, and that of its depth. Where nothing
    # moves, both are that of the root
    sources: Tensor
    targets: Tensor
    # For the host, one after the other in memory: emitted tokens, path, sizes, tokens and parents
    # as above, then the faults, 0 or 1
    report: Tensor  # [8 B (2 E + 2 N + 1) + B] uint8

    def reported(self) -> Report:
        """The parts of `report`."""
        B, E = self.path.shape
        words = self.report[:-B].view(torch.int64)
        N = (len(words) // B - 1) // 2 - E
        emitted, path, sizes, tokens, parents = words.split([B * E, B * E, B, B * N, B * N])
        return Report(
            emitted=emitted.view(B, E),
            path=path.view(B, E),
            sizes=sizes,
            tree_tokens=tokens.view(B, N),
            tree_parents=parents.view(B, N),
            faults=self.report[-B:].view(torch.bool),
        )
