"""Where everything lies among the packed tokens of a step: each row's own tokens, the last of which
is the root, then the nodes below the root. One layout serves prompts, plain decoding and trees.

In an exact form the host reads the trees and packs without gaps. In a padded form all sizes are
bounds that the host knows in advance, so that nothing waits for the device: tokens after the last
row are padding and write to the scratch block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kv.scratch import Scratch
from engine.runner.forms import StepForm
from engine.runner.inputs import StepInputs
from engine.speculation.proposer import Committed
from engine.step.batch import ForwardBatch
from engine.step.tree import DraftTree, VerifyResult
from kernels.ops import AttentionMeta
from kernels.packing.entries import PackedEntries, Walks
from kernels.packing.nodes import NodeTrees, PackedNodes


@dataclass(frozen=True, slots=True)
class Packing:
    """B concatenated parts of different lengths."""

    cu: Tensor  # [B + 1] int64: part b has places cu[b] .. cu[b+1]-1
    row_of: Tensor  # [n] int64, the part of each place; arbitrary for padding
    place: Tensor  # [n] int64, the place within the part; arbitrary for padding
    used: Tensor | None  # [n] bool; None: there is no padding
    width: int | None = None  # of every part, if the host knows that all are equal

    @classmethod
    def of(cls, counts: Tensor, bound: int | None) -> Packing:
        """Parts of `counts` [B] places. `bound`: n, at least the sum of `counts`; None: exactly
        the sum, which the host reads from the device."""
        known = counts.tolist() if bound is None else []
        if len(set(known)) == 1:
            return cls.equal(len(known), known[0], counts.device)
        cu = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        order = torch.arange(sum(known) if bound is None else bound, device=counts.device)
        row_of = torch.searchsorted(cu[1:], order, right=True)
        if bound is None:
            return cls(cu, row_of, order - cu[row_of], None)
        row_of = row_of.clamp(max=len(counts) - 1)
        return cls(cu, row_of, order - cu[row_of], order < cu[-1])

    @classmethod
    def equal(cls, num_rows: int, width: int, device: torch.device) -> Packing:
        """Parts of equal width."""
        cu = torch.arange(num_rows + 1, device=device) * width
        order = torch.arange(num_rows * width, device=device)
        if width == 1:
            return cls(cu, order, torch.zeros_like(order), None, width)
        row_of = order.div(max(width, 1), rounding_mode="floor")
        return cls(cu, row_of, order - row_of * width, None, width)

    def mask_padding(self, values: Tensor, unused: int) -> Tensor:
        """`values` [n] with the padding set to `unused`."""
        return values if self.used is None else torch.where(self.used, values, unused)

    def repeat(self, values: Tensor) -> Tensor:
        """Repeats values [B, ...] of the parts for each of their places, [n, ...]."""
        return values if self.width == 1 else values[self.row_of]

    def unpack(self, values: Tensor, width: int, unused: int) -> Tensor:
        """Values [n] as [B, width]; shorter parts are padded with `unused`."""
        num_rows = len(self.cu) - 1
        if self.width == width:
            return values.view(num_rows, width)
        out = values.new_full((num_rows * width + 1,), unused)
        at = self.mask_padding(self.row_of * width + self.place, num_rows * width)
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
    own: Tensor  # [B] int64, index of each row's first own token among all own tokens
    tokens: Packing  # T
    nodes: Packing  # R; the same object as `tokens` if every row's only own token is its root
    packed: PackedNodes | None = None  # made by `Ops.pack_nodes`, for such rows

    @classmethod
    def of(
        cls,
        inputs: StepInputs,
        tree: DraftTree,
        form: StepForm,
        tables: Tensor,
        scratch: Scratch,
        max_len: int,
        pack_nodes: Callable[[NodeTrees], PackedNodes] | None = None,
    ) -> Layout:
        """`pack_nodes`: as in `Ops`."""
        sizes, lens = tree.sizes, inputs.lens
        if pack_nodes is not None and form.only_roots:
            packed = pack_nodes(_node_trees(inputs, tree, form, tables, scratch, max_len))
            used = None if form.exact else packed.used
            width = 1 if form.exact and len(packed.row_of) == len(lens) else None
            nodes = Packing(packed.cu, packed.row_of, packed.place, used, width)
            # Nothing looks for the own tokens of rows that have only their root.
            return cls(inputs, tree, form, tables, scratch, max_len, lens, nodes, nodes, packed)
        own = lens.cumsum(0) - lens
        if not form.exact:
            sizes = torch.where(inputs.limits > 0, sizes, 0)
        nodes = tokens = Packing.of(sizes, None if form.exact else form.num_nodes)
        if not form.only_roots:
            counts = lens + sizes - (sizes > 0).long()
            tokens = Packing.of(counts, None if form.exact else form.num_tokens)
        return cls(inputs, tree, form, tables, scratch, max_len, own, tokens, nodes)

    def pick_nodes(self, values: Tensor) -> Tensor:
        """Picks from values [T, ...] of tokens those of the nodes, [R, ...]; zeros for padding,
        where kernels may leave NaN. If nodes are `packed`, padding keeps its values, which nothing
        reads."""
        if self.nodes is not self.tokens:
            roots = self.tokens.cu[:-1] + self.inputs.lens - 1
            values = values[self.nodes.mask_padding(self.nodes.repeat(roots) + self.nodes.place, 0)]
        if self.nodes.used is None or self.packed is not None:
            return values
        return torch.where(self.nodes.used.view(-1, *[1] * (values.dim() - 1)), values, 0)

    def unpack_nodes(self, values: Tensor, unused: int = -1) -> Tensor:
        """Values [R] of nodes as [B, N]."""
        if self.packed is not None and self.nodes.width is None:
            return torch.where(self.packed.inside, values[self.packed.at], unused)
        return self.nodes.unpack(values, self.tree.tokens.shape[1], unused)

    def flatten_nodes(self, values: Tensor) -> Tensor:
        """Values [B, N] of nodes as [R]."""
        if self.nodes.width == values.shape[1]:
            return values.flatten()
        return values[self.nodes.row_of, self.nodes.mask_padding(self.nodes.place, 0)]

    def repeat_rows(self, values: Tensor) -> Tensor:
        """Repeats values [B, ...] of rows for each of their nodes, [R, ...]."""
        return self.nodes.repeat(values)

    def batch(self) -> ForwardBatch:
        """The batch that the target computes."""
        if self.packed is not None:
            return self._packed_batch(self.packed)
        packing, starts = self.tokens, self.inputs.starts
        tokens, positions, masks = self._nodes() if self.form.only_roots else self._own_and_nodes()
        return ForwardBatch(
            token_ids=packing.mask_padding(tokens, 0),
            positions=positions.clamp(min=0, max=self.max_len - 1),
            slots=self._slots(packing, packing.repeat(starts) + packing.place),
            attention=AttentionMeta(
                cu_q=packing.cu.int(),
                prefix_lens=starts.int(),
                first_keys=torch.zeros_like(starts, dtype=torch.int32),
                block_tables=self.tables,
                ancestors=packing.mask_padding(masks, 0),
                max_q=self._longest(packing, self.form.max_queries),
                max_context=self._reach(packing),
            ),
            only_roots=self.form.only_roots,
        )

    def _packed_batch(self, packed: PackedNodes) -> ForwardBatch:
        return ForwardBatch(
            token_ids=packed.tokens,
            positions=packed.positions,
            slots=packed.slots,
            attention=AttentionMeta(
                cu_q=packed.cu_q,
                prefix_lens=packed.prefix_lens,
                first_keys=packed.first_keys,
                block_tables=self.tables,
                ancestors=packed.ancestors,
                max_q=self._longest(self.nodes, self.form.max_queries),
                max_context=self._reach(self.nodes),
            ),
            only_roots=True,
        )

    def _nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions and masks if all tokens are nodes. A lone root needs no mask."""
        tree = self.tree
        positions = self.repeat_rows(self.inputs.starts) + self.flatten_nodes(tree.depths)
        masks = self.flatten_nodes(torch.where(tree.sizes[:, None] > 1, tree.ancestors, 0))
        return self.flatten_nodes(tree.tokens), positions, masks

    def _own_and_nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same for prompt chunks, which are causal, and the nodes below their last token."""
        inputs, tree, row = self.inputs, self.tree, self.tokens.row_of
        place = self.tokens.mask_padding(self.tokens.place, 0)
        node = place - inputs.lens[row] + 1
        below = node.clamp(min=0, max=tree.tokens.shape[1] - 1)
        own = inputs.own_tokens[(self.own[row] + place).clamp(max=self.form.num_own - 1)]
        is_node = node >= 0
        tokens = torch.where(is_node, tree.tokens[row, below], own)
        positions = inputs.starts[row] + place - below + tree.depths[row, below]
        in_tree = is_node & (tree.sizes[row] > 1)
        return tokens, positions, torch.where(in_tree, tree.ancestors[row, below], 0)

    def committed(self, result: VerifyResult) -> Committed:
        """The successor of every own token and every accepted node: the next own token, then the
        row's emitted tokens. Successors beyond the length limit or without a slot are left out:
        no token will ever follow them.

        Args:
            result: of all rows; rows that do not sample emit the next prompt token.
        """
        inputs, num_entries = self.inputs, result.emitted.shape[1]
        counts = inputs.lens + result.num_accepted
        room = (inputs.ends - inputs.starts - 1).clamp(min=0)
        bound = self.form.num_own + self.form.num_rows * (num_entries - 1)
        packing = Packing.of(counts.minimum(room), None if self.form.exact else bound)
        row, place = packing.row_of, packing.mask_padding(packing.place, 0)
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
            features=packing.mask_padding(features, 0),
            tokens=packing.mask_padding(tokens, 0),
            positions=packing.mask_padding(cached, 0),
            slots=self._slots(packing, cached),
            block_tables=self.tables,
            max_entries=self._longest(packing, most),
            max_context=self._reach(packing) + 1,
            exact=self.form.exact,
        )

    def packed_entries(
        self, result: VerifyResult, pack_entries: Callable[[Walks], PackedEntries]
    ) -> Committed:
        """As `committed`, of rows that do not sample, too, if all rows have only their root.
        `pack_entries`: as in `Ops`."""
        inputs, num_entries, exact = self.inputs, result.emitted.shape[1], self.form.exact
        packed = pack_entries(
            Walks(
                starts=inputs.starts,
                lens=inputs.lens,
                ends=inputs.ends,
                samples=inputs.samples,
                next_tokens=inputs.next_tokens,
                path=result.path,
                accepted=result.num_accepted,
                emitted=result.emitted,
                firsts=self.nodes.cu,
                tables=self.tables,
                block_size=self.scratch.block_size,
                first_scratch=self.scratch.first_slot,
            )
        )
        packed = packed.without_padding() if exact else packed
        return Committed(
            lines=inputs.lines,
            cu=packed.cu,
            features=packed.features,
            tokens=packed.tokens,
            positions=packed.positions,
            slots=packed.slots,
            block_tables=self.tables,
            max_entries=int(packed.cu.diff().max()) if exact else num_entries,
            max_context=(int(packed.newest.max()) if exact else self._reach(self.tokens)) + 1,
            exact=exact,
            packed=packed,
        )

    def _slots(self, packing: Packing, cached: Tensor) -> Tensor:
        """Slots of cache positions [n]; scratch slots for padding."""
        block_size = self.scratch.block_size
        column = packing.mask_padding(cached // block_size, 0)
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
        """A bound: the cache positions of all rows of a packing are below it."""
        starts = self.inputs.starts
        if not self.form.exact:
            return self.tables.shape[1] * self.scratch.block_size
        if packing.width is not None:
            return int(starts.max()) + packing.width
        return int((starts + packing.cu.diff()).max())


def _node_trees(
    inputs: StepInputs,
    tree: DraftTree,
    form: StepForm,
    tables: Tensor,
    scratch: Scratch,
    max_len: int,
) -> NodeTrees:
    return NodeTrees(
        starts=inputs.starts,
        limits=inputs.limits,
        sizes=tree.sizes,
        tokens=tree.tokens,
        depths=tree.depths,
        ancestors=tree.ancestors,
        tables=tables,
        temperatures=inputs.temperatures,
        seeds=inputs.seeds,
        top_k=inputs.top_k if form.is_filtered else None,
        top_p=inputs.top_p if form.is_filtered else None,
        min_p=inputs.min_p if form.is_filtered else None,
        num_nodes=_num_nodes(tree) if form.exact else form.num_nodes,
        block_size=scratch.block_size,
        first_scratch=scratch.first_slot,
        max_len=max_len,
    )


def _num_nodes(tree: DraftTree) -> int:
    """Nodes of all trees."""
    num_rows, most = tree.tokens.shape
    return num_rows if most == 1 else int(tree.sizes.sum())
