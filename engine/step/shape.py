"""Tree shapes: host integers, so that a plan can carry them. Pure Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

MAX_NODES = 64  # one 64-bit ancestor mask per node


class StaticShape(msgspec.Struct, frozen=True, array_like=True, tag="static"):
    """A fixed tree: `parents[i]` < i is the parent of node i, -1 for the root (node 0). The
    children of a node are its best, second best, ... candidate."""

    name: str
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.parents) <= MAX_NODES:
            raise ValueError(
                f"tree {self.name!r} has {len(self.parents)} nodes; 1 to {MAX_NODES} are possible"
            )
        for node, parent in enumerate(self.parents):
            if node == 0 and parent != -1:
                raise ValueError(f"tree {self.name!r}: node 0 is the root, its parent is -1")
            if node and not 0 <= parent < node:
                raise ValueError(
                    f"tree {self.name!r}: node {node} has parent {parent}; a parent comes before "
                    "its children"
                )

    @property
    def num_nodes(self) -> int:
        return len(self.parents)

    def slots_for(self, num_nodes: int) -> int:
        """Slots a row needs to draft and verify `num_nodes` nodes, root included."""
        return num_nodes

    def first(self, num_nodes: int) -> StaticShape:
        """The tree of the first `num_nodes` nodes."""
        if num_nodes >= self.num_nodes:
            return self
        return StaticShape(self.name, self.parents[:num_nodes])

    @property
    def is_chain(self) -> bool:
        """Whether each node but the last has one child, the next node."""
        return self.parents == tuple(range(-1, len(self.parents) - 1))

    @property
    def depths(self) -> tuple[int, ...]:
        """Depth of every node; the root's is 0."""
        return depths_of(self.parents)

    @property
    def max_depth(self) -> int:
        return max(self.depths)

    @property
    def most_children(self) -> int:
        """The most children of any node."""
        return max(Counter(self.parents[1:]).values(), default=0)

    @property
    def ancestors(self) -> tuple[int, ...]:
        """Ancestors of every node, itself included, as a bit mask over nodes (unsigned)."""
        return ancestors_of(self.parents)


class DynamicShape(msgspec.Struct, frozen=True, array_like=True, tag="dynamic"):
    """EAGLE-2 (arXiv:2406.16858): at every level, the `top_k` likeliest nodes get `top_k` children
    each. At the end, the root and the likeliest `num_nodes - 1` other nodes are kept."""

    name: str
    num_nodes: int  # root included
    max_depth: int
    top_k: int

    def __post_init__(self) -> None:
        if not 2 <= self.num_nodes <= MAX_NODES:
            raise ValueError(
                f"tree {self.name!r}: num_nodes is {self.num_nodes}, not in 2 .. {MAX_NODES}"
            )
        if not 1 <= self.max_depth < MAX_NODES or not 1 <= self.top_k < MAX_NODES:
            raise ValueError(
                f"tree {self.name!r}: max_depth {self.max_depth} and top_k {self.top_k} must lie "
                f"in 1 .. {MAX_NODES - 1}"
            )
        if self.num_drafted > MAX_NODES:
            raise ValueError(
                f"tree {self.name!r} drafts 1 + top_k * (max_depth - 1) = {self.num_drafted} "
                f"nodes; at most {MAX_NODES} are possible"
            )

    @property
    def num_drafted(self) -> int:
        """Nodes that go through the draft head: the root and the frontiers of all levels but the
        last."""
        return 1 + self.top_k * (self.max_depth - 1)

    def slots_for(self, num_nodes: int) -> int:
        """Slots a row needs: frontiers are drafted in full even if few nodes are kept."""
        return max(num_nodes, self.num_drafted)

    @property
    def is_chain(self) -> bool:
        """Whether each node but the last has one child, the next node."""
        return self.top_k == 1

    def first(self, num_nodes: int) -> DynamicShape:
        """The same shape with `num_nodes` nodes."""
        return msgspec.structs.replace(self, num_nodes=max(2, min(num_nodes, self.num_nodes)))

    @property
    def most_children(self) -> int:
        """The most children of any node."""
        return self.top_k


TreeShape = StaticShape | DynamicShape
ROOT = StaticShape("root", (-1,))


def chain(length: int) -> StaticShape:
    """The root and `length` nodes, each the child of the previous one."""
    return StaticShape(f"chain{length}", tuple(range(-1, length)))


def depths_of(parents: Sequence[int]) -> tuple[int, ...]:
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return tuple(depths)


def ancestors_of(parents: Sequence[int]) -> tuple[int, ...]:
    masks: list[int] = []
    for node, parent in enumerate(parents):
        masks.append(1 << node | (masks[parent] if parent >= 0 else 0))
    return tuple(masks)


def signed(mask: int) -> int:
    """The same 64 bits as a signed integer, for int64 tensors."""
    return mask - (1 << 64) if mask >> 63 else mask
