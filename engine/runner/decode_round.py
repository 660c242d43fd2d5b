"""One decode round as a function on the device: draft, verify, commit, extend.

All rows are at their root; all get a tree of one shape; nothing waits for the host, and every shape
follows from the form of the round. So a CUDA graph can hold it, and without one it runs just so.
Rows that are none (padding) and nodes that a row has no room for are computed with the others;
what they write goes to the scratch block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.kv.slots import Scratch, seen_of, slots_of
from engine.models.interface import TargetModel
from engine.parallel.trees import share_round_tree
from engine.sampling.sampler import Sampler
from engine.sampling.spread import SpreadLogits
from engine.speculation.commit import commit
from engine.speculation.proposer import Accepted, Roots, RoundProposer
from engine.speculation.verify import walk
from engine.step.batch import ForwardBatch, ForwardContext
from engine.step.shape import ROOT, TreeShape
from engine.step.tree import DraftTree, VerifyResult
from kernels.ops import AttentionMeta
from kernels.sampling.pipeline_reference import DrawSettings


@dataclass(frozen=True, slots=True)
class RoundForm:
    """What a round is made for; all else comes with its inputs."""

    num_rows: int  # padding included
    shape: TreeShape
    any_sampled: bool  # False: all rows are greedy
    is_filtered: bool  # False: no row has top-k, top-p or min-p


@dataclass(frozen=True, slots=True)
class RoundInputs:
    """Everything a round is told, B rows. A row that is none has `max_nodes` 0."""

    lines: Tensor  # [B] int64, the last line for rows that are none
    follows: Tensor  # [B] bool: the root is what the round before left behind, see `NewestTokens`
    tokens: Tensor  # [B] int64 roots, of rows that do not follow
    positions: Tensor  # [B] int64 of these roots
    max_nodes: Tensor  # [B] int64, root included
    ends: Tensor  # [B] int64, position behind the last that has a slot
    seeds: Tensor  # [B] int64
    top_k: Tensor  # [B] int64, vocabulary size when off
    temperatures: Tensor  # [B] float32
    top_p: Tensor  # [B] float32
    min_p: Tensor  # [B] float32
    table_places: Tensor  # [U] int64, where in the flat block tables blocks are new
    table_blocks: Tensor  # [U] int32, the blocks


@dataclass(frozen=True, slots=True)
class RoundOutputs:
    """What the host learns, once per round."""

    emitted: Tensor  # [B, max_depth + 1] int64, -1 behind the bonus
    path: Tensor  # [B, max_depth + 1] int64 nodes, -1 behind the end
    newest: Tensor  # [B] int64, position of the bonus
    sound: Tensor  # [B] bool: the head's state was finite


@dataclass(frozen=True, slots=True)
class NewestTokens:
    """The bonus of every line's last round, which is the root of its next: so that a round can
    begin before the host has heard of the one before. The last line is that of rows that are none.
    """

    tokens: Tensor  # [lines + 1] int64
    positions: Tensor  # [lines + 1] int64

    @classmethod
    def on(cls, device: torch.device, num_lines: int) -> NewestTokens:
        zeros = torch.zeros(2, num_lines + 1, dtype=torch.int64, device=device)
        return cls(*zeros.unbind())

    def follow(self, inputs: RoundInputs) -> RoundInputs:
        """`inputs` with the roots of rows that follow."""
        lines, follows = inputs.lines, inputs.follows
        return replace(
            inputs,
            tokens=torch.where(follows, self.tokens[lines], inputs.tokens),
            positions=torch.where(follows, self.positions[lines], inputs.positions),
        )

    def keep(self, inputs: RoundInputs, result: VerifyResult) -> Tensor:
        """Take note of what a round drew; returns the positions, [B]."""
        newest = inputs.positions + 1 + result.num_accepted
        bonus = result.emitted.gather(1, result.num_accepted[:, None])[:, 0]
        self.tokens.index_put_((inputs.lines,), bonus)
        self.positions.index_put_((inputs.lines,), newest)
        return newest


@dataclass(frozen=True, slots=True)
class DecodeRound:
    """The parts that take part, and what they keep on the device."""

    model: TargetModel
    context: ForwardContext
    sampler: Sampler
    proposer: RoundProposer
    tables: Tensor  # [lines + 1, columns] int32 block tables of all lines; the last is all scratch
    newest: NewestTokens
    scratch: Scratch
    max_len: int  # positions
    vocab_size: int

    def run(self, inputs: RoundInputs, form: RoundForm) -> RoundOutputs:
        """`inputs` on the device; the outputs too."""
        ops = self.context.ops
        inputs = self.newest.follow(inputs)
        self.tables.view(-1).index_put_((inputs.table_places,), inputs.table_blocks)
        tables = self.tables[inputs.lines]  # [B, columns]
        tree, sound = self._draft(inputs, tables, form)
        batch = self._batch(inputs, tables, tree)
        hidden = self.model.forward(batch, self.context)  # [B * N, H]
        local = self.model.logits(hidden, self.context)
        logits = SpreadLogits.of(local, self.vocab_size, self.context.group)
        drawn = logits.draw(self.sampler, self._settings(inputs, tree, form))
        result = walk(tree, drawn.view(tree.tokens.shape), ops)
        commit(result, batch.slots.view(tree.tokens.shape), self.context.kv, ops)
        if self.proposer.lookahead:
            accepted = self._accepted(inputs, tables, tree, result)
            self.proposer.absorb(accepted, self._max_context)
        newest = self.newest.keep(inputs, result)
        return RoundOutputs(result.emitted, result.path, newest, sound)

    @property
    def _max_context(self) -> int:
        return self.tables.shape[1] * self.scratch.block_size

    def _draft(
        self, inputs: RoundInputs, tables: Tensor, form: RoundForm
    ) -> tuple[DraftTree, Tensor]:
        if form.shape == ROOT:
            every = torch.ones_like(inputs.tokens, dtype=torch.bool)
            return DraftTree.roots(inputs.tokens), every
        roots = Roots(
            lines=inputs.lines,
            tokens=inputs.tokens,
            positions=inputs.positions,
            max_nodes=inputs.max_nodes,
            block_tables=tables,
            temperatures=inputs.temperatures,
            seeds=inputs.seeds,
        )
        sampled = form.any_sampled
        found = self.proposer.draft(roots, form.shape, self._max_context, sampled, self.scratch)
        return share_round_tree(*found, self.context.group)

    def _batch(self, inputs: RoundInputs, tables: Tensor, tree: DraftTree) -> ForwardBatch:
        """All nodes of all trees."""
        num_rows, per_row = tree.tokens.shape
        nodes = torch.arange(per_row, device=tables.device).expand(num_rows, -1)
        slots = slots_of(tables, inputs.positions[:, None] + nodes, self.scratch.block_size)
        slots = self.scratch.instead_of(slots, nodes < inputs.max_nodes[:, None], nodes)
        positions = (inputs.positions[:, None] + tree.depths).clamp(max=self.max_len - 1)
        first_of_row = torch.arange(num_rows + 1, device=tables.device) * per_row
        order = torch.arange(num_rows * per_row, device=tables.device)
        return ForwardBatch(
            token_ids=tree.tokens.flatten(),
            positions=positions.flatten(),
            slots=slots.flatten(),
            attention=AttentionMeta(
                cu_q=first_of_row.int(),
                prefix_lens=inputs.positions.int(),
                first_keys=torch.zeros_like(inputs.positions, dtype=torch.int32),
                block_tables=tables,
                ancestors=seen_of(tree.ancestors, nodes < tree.sizes[:, None]).flatten(),
                max_q=per_row,
                max_context=self._max_context,
            ),
            sampled=order,
            tree_of_node=order // per_row,
            node_of_node=order % per_row,
        )

    def _settings(self, inputs: RoundInputs, tree: DraftTree, form: RoundForm) -> DrawSettings:
        def spread(values: Tensor) -> Tensor:
            return values.repeat_interleave(tree.tokens.shape[1])

        return DrawSettings(
            temperature=spread(inputs.temperatures),
            seeds=spread(inputs.seeds),
            positions=(inputs.positions[:, None] + 1 + tree.depths).flatten(),
            top_k=spread(inputs.top_k) if form.is_filtered else None,
            top_p=spread(inputs.top_p) if form.is_filtered else None,
            min_p=spread(inputs.min_p) if form.is_filtered else None,
            any_sampled=form.any_sampled,
        )

    def _accepted(
        self, inputs: RoundInputs, tables: Tensor, tree: DraftTree, result: VerifyResult
    ) -> Accepted:
        num_rows, num_entries = result.path.shape
        entries = torch.arange(num_entries, device=tables.device).expand(num_rows, -1)
        positions = inputs.positions[:, None] + 1 + entries
        made = (entries <= result.num_accepted[:, None]) & (positions < inputs.ends[:, None])
        slots = slots_of(tables, positions, self.scratch.block_size)
        first_nodes = torch.arange(num_rows, device=tables.device)[:, None] * tree.tokens.shape[1]
        return Accepted(
            lines=inputs.lines,
            last=(made.sum(dim=1) - 1).clamp(min=0),
            features=first_nodes + result.path.clamp(min=0),
            tokens=result.emitted.clamp(min=0),
            positions=positions.clamp(max=self.max_len - 1),
            slots=self.scratch.instead_of(slots, made, entries),
            seen=seen_of(up_to(entries), made),
            block_tables=tables,
        )


def up_to(entries: Tensor) -> Tensor:
    """Bit masks of entry 0 up to each of `entries`, which are below 64."""
    return torch.full_like(entries, -1) ^ (torch.full_like(entries, -2) << entries)
