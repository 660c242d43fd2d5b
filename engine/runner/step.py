"""The body of a step: draft, forward, logits, edit, draw, walk, commit, take.

One body serves decode rows, prompt chunks, penalties, known drafts and log-probabilities. On a CPU
it runs on tensors of exact sizes, and the host may read values. On a GPU nothing in it waits for
the device and every shape follows from the form, so that a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from engine.grammar.grammars import Grammars
from engine.kv.scratch import Scratch
from engine.models.interface import TargetModel
from engine.runner.forms import StepForm
from engine.runner.inputs import StepInputs
from engine.runner.laps import Laps
from engine.runner.layout import Layout
from engine.runner.line_state import LineState
from engine.runner.masking import MaskedRows, cut_tree, node_masks, shared_masks
from engine.sampling.spread import SpreadLogits, edits_of, settings_of
from engine.speculation.proposer import Drafted, DraftLimits, Proposer, Roots, Singles
from engine.speculation.verify import commit, walk
from engine.step.batch import ForwardContext, logit_slices
from engine.step.group import TPGroup
from engine.step.plan import COMMIT, DRAFT, VERIFY
from engine.step.shape import ROOT
from engine.step.tree import DraftTree, VerifyResult
from kernels.packing.settling import DrawnTrees, Report, SettledTrees
from kernels.sampling.settings import BiasEntries, DrawSettings, LogitEdits, Penalties, Scores

Allowed = Callable[[], Tensor]  # returns `DrawSettings.allowed`; it may wait for trees
Score = Callable[[Tensor, Tensor, int, Tensor | None], Scores]  # as `SpreadLogits.score`


class _Started(NamedTuple):
    """The rows of a step. Where positions and limits are None, they are in the inputs."""

    tables: Tensor  # [B, columns] int32 block tables
    positions: Tensor | None = None  # [B] int64, see `Roots`, as the next
    max_nodes: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """The outputs of a step for the host. Large dtypes come first, so that each part is aligned
    when all are joined. Log-probabilities are empty unless the form has them; after those of the
    `num_top` best alternatives come those of the named tokens."""

    emitted: Tensor  # [B, max_depth + 1] int64, -1 after the bonus
    path: Tensor  # [B, max_depth + 1] int64 nodes, -1 after the end
    sizes: Tensor  # [B] int64 of the verified trees
    tree_tokens: Tensor  # [B, N] int64 of their nodes
    tree_parents: Tensor  # [B, N] int64, -1 for the root and for nodes without use
    top_ids: Tensor  # [B, max_depth + 1, n + L] int64
    echo_top_ids: Tensor  # [S, m] int64
    logprobs: Tensor  # [B, max_depth + 1] float32 of emitted tokens
    top: Tensor  # [B, max_depth + 1, n + L] float32
    echo_logprobs: Tensor  # [S] float32 of prompt tokens
    echo_top: Tensor  # [S, m] float32
    pooled: Tensor  # [G, H] float32, sums of hidden states
    faults: Tensor  # [B] bool: the draft head's outputs were not finite

    def parts(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True, slots=True)
class StepBody:
    """Runs one step with a model, a proposer and the state of all lines."""

    model: TargetModel
    context: ForwardContext
    proposer: Proposer
    state: LineState
    scratch: Scratch
    max_len: int  # positions of one sequence
    vocab_size: int
    grammars: Grammars | None = None  # on rank 0, if requests may have them

    def run(self, inputs: StepInputs, form: StepForm, laps: Laps) -> StepOutputs:
        """Inputs and outputs are on the device. `laps` measures host times."""
        layout, faults, allowed = self.draft(inputs, form, laps)
        return self.verify(layout, faults, laps, allowed)

    def draft(
        self, inputs: StepInputs, form: StepForm, laps: Laps
    ) -> tuple[Layout, Tensor, Allowed | None]:
        """The first half. Returns the layout of all tokens and nodes, which rows' trees the head
        could not grow, [B] bool, and if some rows have grammars, what makes the masks of all
        nodes."""
        inputs, started = self._start(inputs, form)
        tables = started.tables
        with laps.time(DRAFT):
            drafted = self._trees(inputs, started, form)
        with laps.time(VERIFY):
            tree, allowed = drafted.tree, None
            if form.is_masked:
                tree, allowed = self._masked(inputs, tree, form)
            pack_nodes = self.context.ops.pack_nodes
            layout = Layout.of(inputs, tree, form, tables, self.scratch, self.max_len, pack_nodes)
        return layout, drafted.faults, allowed

    def _start(self, inputs: StepInputs, form: StepForm) -> tuple[StepInputs, _Started]:
        """Change the block tables; find the roots of rows that follow the last step."""
        state, start_rows = self.state, self.context.ops.start_rows
        if start_rows is not None and form.follows and form.only_roots and not form.exact:
            inputs, found = state.start(inputs, start_rows)
            return inputs, _Started(found.tables, found.positions, found.max_nodes)
        if len(inputs.table_places):
            state.tables.view(-1).index_put_((inputs.table_places,), inputs.table_blocks)
        if form.follows and form.only_roots:
            inputs = state.follow(inputs)
        return inputs, _Started(state.tables[:, : form.num_columns][inputs.lines])

    def _masked(
        self, inputs: StepInputs, tree: DraftTree, form: StepForm
    ) -> tuple[DraftTree, Allowed]:
        """What makes the masks of all nodes, [R, ceil(V / 32)]. Where sizes are exact they are
        made here, and trees are cut to the nodes that can be reached. Elsewhere the host makes
        them while the device runs the target, and waits for the trees alone."""
        rows, device, group = MaskedRows.of(inputs, tree), inputs.lines.device, self.context.group
        if not form.exact:
            wait = rows.fetched()
            make = partial(node_masks, self.grammars, wait, form.num_nodes, self.vocab_size)
            return tree, lambda: shared_masks(make(), device, group)
        num_nodes = int(tree.sizes.sum())
        masks = node_masks(self.grammars, lambda: rows, num_nodes, self.vocab_size)
        masks = shared_masks(masks, device, group)
        if form.max_nodes > 1:
            tree, masks = cut_tree(tree, masks)
            tree = tree.narrowed()
        return tree, lambda: masks

    def verify(
        self, layout: Layout, faults: Tensor, laps: Laps, masks: Allowed | None = None
    ) -> StepOutputs:
        """The second half: emits tokens and updates the caches. `masks`: makes those of all
        nodes."""
        with laps.time(VERIFY):
            batch = layout.batch()
            hidden = self.model.forward(batch, self.context)  # [T, H]
            allowed = None if masks is None else masks()
            result, settled, scores = self._draw_and_walk(layout, hidden, faults, allowed)
            echo, pooled = self._echo(layout, hidden), _pooled(layout, hidden)
        with laps.time(COMMIT):
            self._commit(layout, batch.slots, result, settled)
        with laps.time(DRAFT):
            self._take(layout, result, hidden)
        return StepOutputs(
            **_report(layout, result, faults, settled)._asdict(),
            top_ids=scores.top_ids,
            echo_top_ids=echo.top_ids,
            logprobs=scores.chosen,
            top=scores.top,
            echo_logprobs=echo.chosen,
            echo_top=echo.top,
            pooled=pooled,
        )

    def _trees(self, inputs: StepInputs, started: _Started, form: StepForm) -> Drafted:
        """A tree for every row: the proposer's, a known chain, or only the root."""
        tokens = inputs.own_tokens
        if not form.only_roots:
            tokens = tokens[(inputs.lens.cumsum(0) - 1).clamp(min=0)]
        if form.shape == ROOT:
            drafted = self.state.lone_roots(tokens)
        else:
            roots = self._roots(inputs, tokens, started, form)
            found = self.proposer.draft(roots, form.shape, self._limits(roots, form))
            drafted = shared(found, self.context.group)
        tree = drafted.tree
        if form.num_known:
            tree = tree.with_chains(inputs.known, inputs.num_known)
        chunk = self.model.attention_chunk
        if chunk is not None and tree.max_depth:
            root = inputs.starts + inputs.lens - 1
            tree = tree.ending_at(chunk - 1 - root % chunk)
        if form.exact and form.max_nodes > 1:
            tree = tree.narrowed()
        return Drafted(tree, drafted.faults)

    def _roots(
        self, inputs: StepInputs, tokens: Tensor, started: _Started, form: StepForm
    ) -> Roots:
        positions, max_nodes = started.positions, started.max_nodes
        if positions is None or max_nodes is None:
            positions, max_nodes = inputs.starts, inputs.limits
            if not form.only_roots:
                positions = (inputs.starts + inputs.lens - 1).clamp(min=0)
            if form.num_known:
                max_nodes = torch.where(inputs.num_known > 0, max_nodes.clamp(max=1), max_nodes)
        return Roots(
            lines=inputs.lines,
            tokens=tokens,
            positions=positions,
            max_nodes=max_nodes,
            block_tables=started.tables,
            temperatures=inputs.temperatures,
            seeds=inputs.seeds,
            top_k=inputs.top_k,
            top_p=inputs.top_p,
            min_p=inputs.min_p,
        )

    def _limits(self, roots: Roots, form: StepForm) -> DraftLimits:
        reach = roots.block_tables.shape[1] * self.scratch.block_size
        if form.exact:
            reach = int(roots.positions.max()) + form.shape.slots_for(form.shape.num_nodes)
        return DraftLimits(form.exact, form.any_sampled, form.is_filtered, reach, self.max_len)

    def _draw_and_walk(
        self, layout: Layout, hidden: Tensor, faults: Tensor, allowed: Tensor | None
    ) -> tuple[VerifyResult, SettledTrees | None, Scores]:
        """Draw the target's token at every node, LOGIT_ROWS nodes at a time, then walk."""
        inputs, form, context = layout.inputs, layout.form, self.context
        if not form.draws:
            column = torch.zeros_like(inputs.lines)[:, None]
            return VerifyResult(column, column[:, 0], column - 1), None, _no_scores(hidden)
        nodes, settings = layout.pick_nodes(hidden), _draw_settings(layout, allowed)
        edits = self._edits(layout, settings.positions)
        drawn = []
        for some in logit_slices(len(nodes)):
            logits = self._logits(nodes[some])
            part = None if edits is None else edits_of(edits, some)
            drawn.append(logits.draw(settings_of(settings, some), part))
        tokens = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        settled = self._settle(layout, tokens, faults)
        if settled is None:
            result = walk(layout.tree, layout.unpack_nodes(tokens), context.ops)
        else:
            result = VerifyResult(settled.path, settled.num_accepted, settled.emitted)
        if form.num_top < 0:
            return result, settled, _no_scores(hidden)

        def again(at: Tensor, tokens: Tensor, num_top: int, named: Tensor | None) -> Scores:
            masks = None if allowed is None else allowed[at]
            return self._scores(nodes[at], tokens, num_top, named, masks)

        # Logits that were computed all at once are still there.
        once = partial(logits.score, allowed=allowed)
        score = once if len(drawn) == 1 else again
        return result, settled, _emitted_scores(layout, len(nodes), score, result)

    def _settle(self, layout: Layout, drawn: Tensor, faults: Tensor) -> SettledTrees | None:
        """Walk and keep the next roots in one launch, where that is possible."""
        settle, packed = self.context.ops.settle, layout.packed
        if settle is None or packed is None or not layout.form.follows:
            return None
        inputs, tree = layout.inputs, layout.tree
        return settle(
            DrawnTrees(
                tokens=tree.tokens,
                parents=tree.parents,
                sizes=tree.sizes,
                faults=faults,
                drawn=drawn,
                at=packed.at,
                inside=packed.inside,
                slots=packed.slots,
                lines=inputs.lines,
                starts=inputs.starts,
                lens=inputs.lens,
                line_tokens=self.state.tokens,
                line_positions=self.state.positions,
                max_depth=tree.max_depth,
                first_scratch=self.scratch.first_slot,
            )
        )

    def _logits(self, hidden: Tensor) -> SpreadLogits:
        """Those after hidden states [R, H]."""
        local = self.model.logits(hidden, self.context)
        return SpreadLogits.of(local, self.vocab_size, self.context.group, self.context.ops)

    def _scores(
        self,
        hidden: Tensor,
        tokens: Tensor,
        num_top: int,
        named: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Scores:
        """Log-probabilities of the tokens [S] after hidden states [S, H], LOGIT_ROWS at a time.
        `named` [S, L]: further ones. `allowed` [S, ceil(V / 32)]: other tokens have no
        probability."""
        found = []
        for some in logit_slices(len(hidden)):
            logits = self._logits(hidden[some])
            order = torch.arange(logits.num_rows, device=hidden.device)
            others, masks = (None if part is None else part[some] for part in (named, allowed))
            found.append(logits.score(order, tokens[some], num_top, others, masks))
        return Scores(*(torch.cat(parts) for parts in zip(*map(_parts, found), strict=True)))

    def _edits(self, layout: Layout, positions: Tensor) -> LogitEdits | None:
        """The changes to the logits of all nodes, each with the history of its own path."""
        inputs, form = layout.inputs, layout.form
        penalties = bias = None
        if form.is_penalised:
            penalties = Penalties(
                counts=self.state.counts,
                lines=layout.repeat_rows(inputs.lines),
                paths=_paths(layout),
                repetition=layout.repeat_rows(inputs.repetition),
                frequency=layout.repeat_rows(inputs.frequency),
                presence=layout.repeat_rows(inputs.presence),
            )
        if form.num_bias:
            lists = layout.nodes.row_of
            bias = BiasEntries(lists, inputs.bias_ids, inputs.bias_values, inputs.bias_until)
        if penalties is None and bias is None:
            return None
        return LogitEdits(positions, penalties, bias)

    def _echo(self, layout: Layout, hidden: Tensor) -> Scores:
        """Log-probabilities of prompt tokens."""
        inputs, form = layout.inputs, layout.form
        if form.num_echo == 0:
            return _no_scores(hidden)
        places = layout.tokens.cu[inputs.echo_rows] + inputs.echo_places
        return self._scores(hidden[places], inputs.echo_tokens, form.num_echo_top)

    def _commit(
        self, layout: Layout, slots: Tensor, result: VerifyResult, settled: SettledTrees | None
    ) -> None:
        """Move the KV of accepted nodes, and store the drawn tokens."""
        if not layout.form.draws:
            return
        inputs, context = layout.inputs, self.context
        # The nodes of a chain, and of a known draft, lie where plain decoding puts their tokens.
        moves = bool(layout.tree.max_depth) and not layout.form.shape.is_chain
        if moves and settled is not None:
            pages = (*context.kv.keys, *context.kv.values)
            context.ops.kv_move(pages, settled.sources, settled.targets)
        elif moves:
            node_slots = layout.unpack_nodes(layout.pick_nodes(slots), self.scratch.first_slot)
            commit(result, node_slots, context.kv, context.ops)
        if settled is None and layout.form.follows:
            self.state.keep(inputs.lines, inputs.starts + inputs.lens - 1, result)
        if layout.form.is_penalised:
            self.state.count(inputs, result)

    def _take(self, layout: Layout, result: VerifyResult, hidden: Tensor) -> None:
        """Hand every committed token to a proposer that keeps a cache of them."""
        if self.proposer.lookahead == 0:
            return
        inputs, form = layout.inputs, layout.form
        if form.exact and form.only_roots and layout.tree.max_depth == 0:
            tokens = torch.where(inputs.samples, result.emitted[:, 0], inputs.next_tokens)
            after = inputs.starts + 1
            singles = Singles(inputs.lines, tokens, after, inputs.ends, layout.tables)
            self.proposer.take_singles(singles, hidden)
            return
        pack_entries = self.context.ops.pack_entries
        if layout.packed is not None and pack_entries is not None:
            self.proposer.take(layout.packed_entries(result, pack_entries), hidden)
            return
        emitted = result.emitted.clone()
        emitted[:, 0] = torch.where(inputs.samples, emitted[:, 0], inputs.next_tokens)
        accepted = torch.where(inputs.samples, result.num_accepted, 0)
        self.proposer.take(layout.committed(VerifyResult(result.path, accepted, emitted)), hidden)


def shared(drafted: Drafted, group: TPGroup) -> Drafted:
    """Rank 0's trees on every rank: ranks may differ in the last bits and grow other trees."""
    if group.size == 1:
        return drafted
    tree, width = drafted.tree, drafted.tree.tokens.shape[1]
    nodes = (tree.tokens, tree.parents, tree.depths, tree.ancestors)
    packed = torch.cat([*nodes, tree.sizes[:, None], drafted.faults[:, None].long()], dim=1)
    packed = group.from_first(packed)
    tokens, parents, depths, masks = packed[:, :-2].view(len(packed), len(nodes), width).unbind(1)
    tree = DraftTree(tokens, parents, depths, masks, packed[:, -2], tree.max_depth)
    return Drafted(tree, packed[:, -1] > 0)


def _report(
    layout: Layout, result: VerifyResult, faults: Tensor, settled: SettledTrees | None
) -> Report:
    if settled is not None:
        return settled.reported()
    tree = layout.tree
    return Report(result.emitted, result.path, tree.sizes, tree.tokens, tree.parents, faults)


def _draw_settings(layout: Layout, allowed: Tensor | None) -> DrawSettings:
    """The settings to draw the token of each node, [R]."""
    inputs, form, packed = layout.inputs, layout.form, layout.packed
    if packed is not None:
        return DrawSettings(
            temperature=packed.temperatures,
            seeds=packed.seeds,
            positions=packed.draw_positions,
            top_k=packed.top_k,
            top_p=packed.top_p,
            min_p=packed.min_p,
            allowed=allowed,
            any_sampled=form.any_sampled,
            any_greedy=form.any_greedy,
        )
    roots = inputs.starts + inputs.lens
    repeat = layout.repeat_rows
    return DrawSettings(
        temperature=repeat(inputs.temperatures),
        seeds=repeat(inputs.seeds),
        positions=repeat(roots) + layout.flatten_nodes(layout.tree.depths),
        top_k=repeat(inputs.top_k) if form.is_filtered else None,
        top_p=repeat(inputs.top_p) if form.is_filtered else None,
        min_p=repeat(inputs.min_p) if form.is_filtered else None,
        allowed=allowed,
        any_sampled=form.any_sampled,
        any_greedy=form.any_greedy,
    )


def _pooled(layout: Layout, hidden: Tensor) -> Tensor:
    """[G, H] float32: for each row that wants them, the sum of the hidden states of its tokens."""
    inputs, form = layout.inputs, layout.form
    if form.num_pooled == 0:
        return torch.empty(0, device=hidden.device)  # no kernel
    places = layout.tokens.cu[inputs.pool_rows] + inputs.pool_places
    sums = torch.zeros(form.num_pools + 1, hidden.shape[1], device=hidden.device)
    return sums.index_add_(0, inputs.pool_numbers, hidden[places].float())[:-1]


def _paths(layout: Layout) -> Tensor:
    """[R, D] int64: the drafted tokens on the path from each node up to its root (excluded), then
    -1."""
    tree = layout.tree
    node = torch.arange(tree.tokens.shape[1], device=tree.tokens.device).expand_as(tree.tokens)
    found = []
    for _ in range(tree.max_depth):
        found.append(torch.where(node > 0, tree.tokens.gather(1, node), -1))
        node = tree.parents.gather(1, node).clamp(min=0)
    if not found:
        return tree.tokens.new_empty(len(layout.nodes.row_of), 0)
    return torch.stack([layout.flatten_nodes(tokens) for tokens in found], dim=1)


def _emitted_scores(layout: Layout, num_nodes: int, score: Score, result: VerifyResult) -> Scores:
    """Log-probabilities of the emitted tokens, [B, max_depth + 1]; arbitrary where a row emits
    nothing or did not ask for them."""
    num_top = layout.form.num_top
    at = (layout.nodes.cu[:-1, None] + result.path.clamp(min=0)).clamp(max=num_nodes - 1)
    wanted = layout.inputs.scored[:, None] & (result.path >= 0)
    named = None
    if layout.form.num_named:
        named = layout.inputs.named_ids[:, None].expand(*wanted.shape, -1)  # [B, max_depth + 1, L]
    if not layout.form.exact:
        others = None if named is None else named.flatten(0, 1)
        found = score(at.flatten(), result.emitted.clamp(min=0).flatten(), num_top, others)
        return Scores(*(part.view(*wanted.shape, *part.shape[1:]) for part in _parts(found)))
    others = None if named is None else named[wanted]
    found = score(at[wanted], result.emitted[wanted].clamp(min=0), num_top, others)
    return Scores(*(_where(wanted, part) for part in _parts(found)))


def _where(wanted: Tensor, values: Tensor) -> Tensor:
    """`values` [n, ...] at the n true places of `wanted` [B, E], zeros elsewhere: [B, E, ...]."""
    return values.new_zeros(*wanted.shape, *values.shape[1:]).index_put((wanted,), values)


def _parts(scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    return scores.chosen, scores.top_ids, scores.top


def _no_scores(like: Tensor) -> Scores:
    nothing = torch.empty(0, device=like.device)  # no kernel
    return Scores(nothing, torch.empty(0, dtype=torch.int64, device=like.device), nothing)
