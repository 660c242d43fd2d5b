"""The tokens that grammars allow at every node of a step's trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from engine.copies import Fetch, join, upload, view
from engine.grammar.grammars import Grammars
from engine.grammar.matcher import EVERYTHING
from engine.runner.inputs import StepInputs
from engine.step.group import TPGroup
from engine.step.tree import DraftTree


class MaskedRows(NamedTuple):
    """What masks depend on: the rows of a step and their trees. Large dtypes come first, so that
    each part is aligned when all are joined."""

    lines: Tensor  # [B] int64
    limits: Tensor  # [B] int64
    sizes: Tensor  # [B] int64
    tokens: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int64
    samples: Tensor  # [B] bool

    @classmethod
    def of(cls, inputs: StepInputs, tree: DraftTree) -> MaskedRows:
        return cls(
            inputs.lines, inputs.limits, tree.sizes, tree.tokens, tree.parents, inputs.samples
        )

    def fetched(self) -> Callable[[], MaskedRows]:
        """Starts a copy to the host; the result waits for it."""
        fetch = Fetch(join(self))

        def wait() -> MaskedRows:
            here, parts, first = fetch.wait(), [], 0
            for like in self:
                parts.append(view(here, first, like))
                first += like.numel() * like.itemsize
            return MaskedRows(*parts)

        return wait


def node_masks(
    grammars: Grammars | None, wait: Callable[[], MaskedRows], num_nodes: int, vocab_size: int
) -> Tensor:
    """A mask for each of the packed nodes, [num_nodes, ceil(V / 32)] int32 (see
    `DrawSettings.allowed`), from host tensors. Rows without a grammar may draw any token.

    Args:
        grammars: None on ranks that get the masks of rank 0: theirs are arbitrary.
        wait: returns the rows, on the host.
        num_nodes: at least the sum of the sizes of trees. Padding rows have none.
    """
    masks = torch.full((num_nodes, -(-vocab_size // 32)), EVERYTHING, dtype=torch.int32)
    if grammars is None:
        return masks
    rows, out, first = wait(), masks.numpy(), 0
    sizes = torch.where(rows.limits > 0, rows.sizes, 0)
    found = zip(rows.lines.tolist(), rows.samples.tolist(), sizes.tolist(), strict=True)
    for row, (line, samples, size) in enumerate(found):
        matcher = grammars.of_line(line) if size and samples else None
        if matcher is not None:
            tokens, parents = rows.tokens[row, :size].tolist(), rows.parents[row, :size].tolist()
            matcher.fill(tokens, parents, out[first : first + size])
        first += size
    return masks


def cut_tree(tree: DraftTree, masks: Tensor) -> tuple[DraftTree, Tensor]:
    """Cut what comes after the last node that can be reached, in each row, and its masks.

    Args:
        tree: on the host.
        masks: [R, ceil(V / 32)], of all nodes row after row, without padding.
    """
    firsts = (tree.sizes.cumsum(0) - tree.sizes)[:, None]  # [B, 1]
    nodes = torch.arange(tree.tokens.shape[1])
    used = nodes < tree.sizes[:, None]
    above = torch.where(used, firsts + tree.parents.clamp(min=0), 0)  # [B, N] rows of `masks`
    words = masks[above, tree.tokens.clamp(min=0) >> 5]
    reached = used & ((words >> (tree.tokens & 31)) & 1 == 1)
    reached[:, 0] = True
    if bool((reached == used).all()):
        return tree, masks
    for node in range(1, tree.tokens.shape[1]):
        parents = tree.parents[:, node].clamp(min=0)
        reached[:, node] &= reached.gather(1, parents[:, None])[:, 0]
    sizes = torch.where(reached, nodes + 1, 0).amax(dim=1)
    kept = (nodes < sizes[:, None])[used]
    return tree.cut(sizes), masks[kept]


def shared_masks(masks: Tensor, device: torch.device, group: TPGroup) -> Tensor:
    """Rank 0's masks on every rank, on the device: only rank 0 follows grammars."""
    return group.from_first(upload(masks, device))
