"""Where everything lies among the packed tokens of a step: each row's own tokens, then the nodes
below its last one, which is the root. One layout serves prompts, plain decoding and trees.

In an exact form the host looks at the trees and packs tightly. In a padded form all sizes are
bounds that the host knew before, so that nothing waits for the device: what lies after the last row
is padding, belongs to no row, and goes to scratch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kv.slots import Scratch
from engine.runner.inputs import StepForm, StepInputs
from engine.speculation.proposer import Committed
from engine.step.batch import ForwardBatch
from engine.step.tree import DraftTree, VerifyResult
from kernels.ops import AttentionMeta


@dataclass(frozen=True, slots=True)
class Packing:
    """Where B parts of different lengths lie, one after the other."""

    cu: Tensor  # [B + 1] int64: part b has places cu[b] .. cu[b+1]-1
    row_of: Tensor  # [n] int64, the part of each place; some part for padding
    place: Tensor  # [n] int64, the place within the part; anything for padding
    used: Tensor | None  # [n] bool; None: there is no padding
    width: int | None = None  # of every part, where the host knows that all are alike

    @classmethod
    def of(cls, counts: Tensor, bound: int | None) -> Packing:
        """Parts of `counts` [B] places. `bound`: places there may be; None: as many as there are,
        which the host has to look at."""
        known = counts.tolist() if bound is None else []
        if len(set(known)) == 1:
            return cls.alike(len(known), known[0], counts.device)
        cu = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        order = torch.arange(sum(known) if bound is None else bound, device=counts.device)
        row_of = torch.searchsorted(cu[1:], order, right=True)
        if bound is None:
            return cls(cu, row_of, order - cu[row_of], None)
        row_of = row_of.clamp(max=len(counts) - 1)
        return cls(cu, row_of, order - cu[row_of], order < cu[-1])

    @classmethod
    def alike(cls, num_rows: int, width: int, device: torch.device) -> Packing:
        """Parts of one width."""
        cu = torch.arange(num_rows + 1, device=device) * width
        order = torch.arange(num_rows * width, device=device)
        if width == 1:
            return cls(cu, order, torch.zeros_like(order), None, width)
        row_of = order.div(max(width, 1), rounding_mode="floor")
        return cls(cu, row_of, order - row_of * width, None, width)

    def keep(self, values: Tensor, unused: int) -> Tensor:
        """`values` [n] with `unused` in the padding."""
        return values if self.used is None else torch.where(self.used, values, unused)

    def of_row(self, values: Tensor) -> Tensor:
        """Values [B, ...] of the parts for each place, [n, ...]."""
        return values if self.width == 1 else values[self.row_of]

    def spread(self, values: Tensor, width: int, unused: int) -> Tensor:
        """Values [n] as [B, width], `unused` where a part is shorter."""
        num_rows = len(self.cu) - 1
        if self.width == width:
            return values.view(num_rows, width)
        out = values.new_full((num_rows * width + 1,), unused)
        at = self.keep(self.row_of * width + self.place, num_rows * width)
        return out.index_put_((at,), values)[:-1].view(num_rows, width)


@dataclass(frozen=True, slots=True)
class Layout:
    """One step's tokens and nodes."""

    inputs: StepInputs
    tree: DraftTree
    form: StepForm
    tables: Tensor  # [B, columns] int32
    scratch: Scratch
    max_len: int
    own: Tensor  # [B] int64, where each row's own tokens begin among all
    tokens: Packing  # T
    nodes: Packing  # R; the same as `tokens` where every row has its root alone, then T is R

    @classmethod
    def of(
        cls,
        inputs: StepInputs,
        tree: DraftTree,
        form: StepForm,
        tables: Tensor,
        scratch: Scratch,
        max_len: int,
    ) -> Layout:
        sizes, lens = tree.sizes, inputs.lens
        if not form.exact:
            sizes = torch.where(inputs.limits > 0, sizes, 0)
        nodes = tokens = Packing.of(sizes, None if form.exact else form.num_nodes)
        if not form.only_roots:
            counts = lens + sizes - (sizes > 0).long()
            tokens = Packing.of(counts, None if form.exact else form.num_tokens)
        own = lens.cumsum(0) - lens
        return cls(inputs, tree, form, tables, scratch, max_len, own, tokens, nodes)

    def at_nodes(self, values: Tensor) -> Tensor:
        """Values [T, ...] of the tokens at the nodes, [R, ...]; zeros for padding, for what kernels
        leave there may be NaN."""
        if self.nodes is not self.tokens:
            roots = self.tokens.cu[:-1] + self.inputs.lens - 1
            values = values[self.nodes.keep(self.nodes.of_row(roots) + self.nodes.place, 0)]
        if self.nodes.used is None:
            return values
        return torch.where(self.nodes.used.view(-1, *[1] * (values.dim() - 1)), values, 0)

    def nodes_of(self, values: Tensor, unused: int = -1) -> Tensor:
        """Values [R] of the nodes as [B, N]."""
        return self.nodes.spread(values, self.tree.tokens.shape[1], unused)

    def of_node(self, values: Tensor) -> Tensor:
        """Values [B, N] of tree nodes as [R]."""
        if self.nodes.width == values.shape[1]:
            return values.flatten()
        return values[self.nodes.row_of, self.nodes.keep(self.nodes.place, 0)]

    def of_row(self, values: Tensor) -> Tensor:
        """Values [B, ...] of rows for each of their nodes, [R, ...]."""
        return self.nodes.of_row(values)

    def batch(self) -> ForwardBatch:
        """What the target computes."""
        packing, starts = self.tokens, self.inputs.starts
        tokens, positions, masks = self._nodes() if self.form.only_roots else self._own_and_nodes()
        return ForwardBatch(
            token_ids=packing.keep(tokens, 0),
            positions=positions.clamp(min=0, max=self.max_len - 1),
            slots=self._slots(packing, packing.of_row(starts) + packing.place),
            attention=AttentionMeta(
                cu_q=packing.cu.int(),
                prefix_lens=starts.int(),
                first_keys=torch.zeros_like(starts, dtype=torch.int32),
                block_tables=self.tables,
                ancestors=packing.keep(masks, 0),
                max_q=self._longest(packing, self.form.max_queries),
                max_context=self._reach(packing),
            ),
        )

    def _nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions and masks of nodes alone. A root without nodes needs no mask."""
        tree = self.tree
        positions = self.of_row(self.inputs.starts) + self.of_node(tree.depths)
        masks = self.of_node(torch.where(tree.sizes[:, None] > 1, tree.ancestors, 0))
        return self.of_node(tree.tokens), positions, masks

    def _own_and_nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of prompt chunks, which are causal, and of the nodes below their last token."""
        inputs, tree, row = self.inputs, self.tree, self.tokens.row_of
        place = self.tokens.keep(self.tokens.place, 0)
        node = place - inputs.lens[row] + 1
        below = node.clamp(min=0, max=tree.tokens.shape[1] - 1)
        own = inputs.own_tokens[(self.own[row] + place).clamp(max=self.form.num_own - 1)]
        is_node = node >= 0
        tokens = torch.where(is_node, tree.tokens[row, below], own)
        positions = inputs.starts[row] + place - below + tree.depths[row, below]
        in_tree = is_node & (tree.sizes[row] > 1)
        return tokens, positions, torch.where(in_tree, tree.ancestors[row, below], 0)

    def committed(self, result: VerifyResult) -> Committed:
        """All tokens that follow a computed and accepted one: after each own token the next, then
        what the row emitted. A token beyond the length limit or without a slot is left out: nothing
        will ever follow it.

        Args:
            result: of all rows; those that do not sample emit the token that is known to follow.
        """
        inputs, num_entries = self.inputs, result.emitted.shape[1]
        counts = inputs.lens + result.num_accepted
        room = (inputs.ends - inputs.starts - 1).clamp(min=0)
        bound = self.form.num_own + self.form.num_rows * (num_entries - 1)
        packing = Packing.of(counts.minimum(room), None if self.form.exact else bound)
        row, place = packing.row_of, packing.keep(packing.place, 0)
        drawn = place - inputs.lens[row] + 1
        step = drawn.clamp(min=0, max=num_entries - 1)
        tokens = result.emitted[row, step].clamp(min=0)
        nodes = result.path[row, step].clamp(min=0)
        features = self.tokens.cu[row] + place - drawn.clamp(min=0) + nodes
        if not self.form.only_roots:
            following = (self.own[row] + place + 1).clamp(max=self.form.num_own - 1)
            tokens = torch.where(drawn < 0, inputs.own_tokens[following], tokens)
        cached = inputs.starts[row] + place + 1
        most = num_entries if self.form.only_roots else self.form.num_own + num_entries - 1
        return Committed(
            lines=inputs.lines,
            cu=packing.cu,
            features=packing.keep(features, 0),
            tokens=packing.keep(tokens, 0),
            positions=packing.keep(cached, 0),
            slots=self._slots(packing, cached),
            block_tables=self.tables,
            max_entries=self._longest(packing, most),
            max_context=self._reach(packing) + 1,
            exact=self.form.exact,
        )

    def _slots(self, packing: Packing, cached: Tensor) -> Tensor:
        """Of cache positions [n]; scratch for padding."""
        block_size = self.scratch.block_size
        column = packing.keep(cached // block_size, 0)
        slots = self.tables[packing.row_of, column].long() * block_size + cached % block_size
        if packing.used is None:
            return slots
        order = torch.arange(len(slots), device=slots.device)
        return self.scratch.instead_of(slots, packing.used, order)

    def _longest(self, packing: Packing, bound: int) -> int:
        if not self.form.exact:
            return bound
        return int(packing.cu.diff().max()) if packing.width is None else packing.width

    def _reach(self, packing: Packing) -> int:
        """No row of a packing reaches as far into the cache."""
        starts = self.inputs.starts
        if not self.form.exact:
            return self.tables.shape[1] * self.scratch.block_size
        if packing.width is not None:
            return int(starts.max()) + packing.width
        return int((starts + packing.cu.diff()).max())
