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
    """B parts of different lengths, one after the other."""

    cu: Tensor  # [B + 1] int64: part b has places cu[b] .. cu[b+1]-1
    row_of: Tensor  # [n] int64, the part of each place; some part for padding
    place: Tensor  # [n] int64, the place within the part; anything for padding
    used: Tensor | None  # [n] bool; None: there is no padding

    @classmethod
    def of(cls, counts: Tensor, bound: int | None) -> Packing:
        """Parts of `counts` [B] places. `bound`: places there may be; None: as many as there are,
        which the host has to look at."""
        cu = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        size = int(cu[-1]) if bound is None else bound
        order = torch.arange(size, device=counts.device)
        row_of = torch.searchsorted(cu[1:], order, right=True)
        if bound is None:
            return cls(cu, row_of, order - cu[row_of], None)
        row_of = row_of.clamp(max=len(counts) - 1)
        return cls(cu, row_of, order - cu[row_of], order < cu[-1])

    def keep(self, values: Tensor, unused: int) -> Tensor:
        """`values` [n] with `unused` in the padding."""
        return values if self.used is None else torch.where(self.used, values, unused)

    def spread(self, values: Tensor, width: int, unused: int) -> Tensor:
        """Values [n] as [B, width], `unused` where a part is shorter."""
        num_rows = len(self.cu) - 1
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
    nodes: Packing  # R

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
        sizes = torch.where(inputs.limits > 0, tree.sizes, 0)
        counts = torch.where(inputs.limits > 0, inputs.lens + sizes - 1, 0)
        own = inputs.lens.cumsum(0) - inputs.lens
        tokens = Packing.of(counts, None if form.exact else form.num_tokens)
        nodes = Packing.of(sizes, None if form.exact else form.num_nodes)
        return cls(inputs, tree, form, tables, scratch, max_len, own, tokens, nodes)

    @property
    def roots(self) -> Tensor:
        """[B] int64 where each row's root lies among the T tokens; some place for padding rows."""
        return (self.tokens.cu[:-1] + self.inputs.lens - 1).clamp(min=0)

    @property
    def sampled(self) -> Tensor:
        """[R] int64 where each node lies among the T tokens."""
        return self.nodes.keep(self.roots[self.nodes.row_of] + self.nodes.place, 0)

    def of_sampled(self, hidden: Tensor) -> Tensor:
        """What lies at the nodes [R, H] of [T, H]. Padding reads zeros, for what a kernel leaves
        behind where no row is may be NaN."""
        rows = hidden[self.sampled]
        return rows if self.nodes.used is None else torch.where(self.nodes.used[:, None], rows, 0)

    def nodes_of(self, values: Tensor, unused: int = -1) -> Tensor:
        """Values [R] of the nodes as [B, N]."""
        return self.nodes.spread(values, self.tree.tokens.shape[1], unused)

    def of_node(self, values: Tensor) -> Tensor:
        """Values [B, N] of tree nodes as [R]."""
        return values[self.nodes.row_of, self._node_place]

    def of_row(self, values: Tensor) -> Tensor:
        """Values [B, ...] of rows for each of their nodes, [R, ...]."""
        return values[self.nodes.row_of]

    @property
    def _node_place(self) -> Tensor:
        return self.nodes.keep(self.nodes.place, 0)

    def batch(self) -> ForwardBatch:
        """What the target computes."""
        inputs, tree, packing = self.inputs, self.tree, self.tokens
        row, place = packing.row_of, packing.keep(packing.place, 0)
        node = place if self.form.only_roots else place - inputs.lens[row] + 1
        below = node.clamp(min=0, max=tree.tokens.shape[1] - 1)
        tokens, depths = tree.tokens[row, below], tree.depths[row, below]
        masks = torch.where(tree.sizes[row] > 1, tree.ancestors[row, below], 0)
        cached = inputs.starts[row] + place  # position in the cache
        if not self.form.only_roots:
            own = inputs.own_tokens[(self.own[row] + place).clamp(max=self.form.num_own - 1)]
            tokens = torch.where(node < 0, own, tokens)
            masks = torch.where(node < 0, 0, masks)
        positions = (cached - below + depths).clamp(min=0, max=self.max_len - 1)
        return ForwardBatch(
            token_ids=packing.keep(tokens, 0),
            positions=positions,
            slots=self._slots(packing, row, cached),
            attention=AttentionMeta(
                cu_q=packing.cu.int(),
                prefix_lens=inputs.starts.int(),
                first_keys=torch.zeros_like(inputs.starts, dtype=torch.int32),
                block_tables=self.tables,
                ancestors=packing.keep(masks, 0),
                max_q=self._longest(packing, self.form.max_queries),
                max_context=self._reach(packing),
            ),
        )

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
            slots=self._slots(packing, row, cached),
            block_tables=self.tables,
            max_entries=self._longest(packing, most),
            max_context=self._reach(packing) + 1,
            exact=self.form.exact,
        )

    def _slots(self, packing: Packing, row: Tensor, cached: Tensor) -> Tensor:
        """Of cache positions; scratch for padding."""
        block_size = self.scratch.block_size
        blocks = self.tables[row, packing.keep(cached // block_size, 0)].long()
        slots = blocks * block_size + cached % block_size
        if packing.used is None:
            return slots
        order = torch.arange(len(slots), device=slots.device)
        return self.scratch.instead_of(slots, packing.used, order)

    def _longest(self, packing: Packing, bound: int) -> int:
        return int(packing.cu.diff().max()) if self.form.exact else bound

    def _reach(self, packing: Packing) -> int:
        """No row of a packing reaches as far into the cache."""
        if self.form.exact:
            return int((self.inputs.starts + packing.cu.diff()).max())
        return self.tables.shape[1] * self.scratch.block_size
