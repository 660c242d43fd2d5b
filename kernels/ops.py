"""The operation table: one typed callable per operation, chosen once at start.

Legend of shapes: T packed tokens of the step, B rows, H hidden size, Hq / Hkv query and KV heads,
D head dimension, F feed-forward size, E experts, V vocabulary, S block size, R sampled nodes, C
candidates and N nodes of a tree.

A model never names a backend; it calls `ops.<operation>`. Every backend of an operation computes
what `kernels/<operation>/reference.py` computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.drafting.nodes import (
    Candidates,
    Frontier,
    HeadInput,
    LaidNodes,
    LevelNodes,
    ReadyRoots,
    RootStates,
    RowPlaces,
)
from kernels.linear.grouped import GroupLayout
from kernels.linear.quantised import Part
from kernels.linear.scaled import ScaledLayout
from kernels.packing.entries import PackedEntries, Walks
from kernels.packing.nodes import NodeTrees, PackedNodes
from kernels.packing.rows import LineRows, StartedRows
from kernels.packing.settling import DrawnTrees, SettledTrees
from kernels.sampling.rank.ranking import NodeDraws, Ranked
from kernels.sampling.settings import DrawSettings, LogitEdits, Scores


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A weight in its backend's layout, made once by `ops.pack_linear`."""

    data: Tensor  # in the backend's layout
    bias: Tensor | None  # [N] float32
    out_features: int
    in_features: int
    layout: GroupLayout | ScaledLayout | None = None  # of quantised weights
    scales: Tensor | None = None  # of quantised weights, where `data` does not hold them
    minimums: Tensor | None = None  # the same
    # Weights of other layouts whose outputs follow those of this one
    more: tuple[LinearWeight, ...] = ()

    @property
    def all_features(self) -> int:
        """Outputs of this weight and of those that follow."""
        return self.out_features + sum(part.out_features for part in self.more)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Feed-forward blocks of which each token uses one, packed. Each tuple has a weight per expert,
    or, with `Ops.stacks_experts`, a single one of them all: plain with data [E, in, out]; in FP8
    with data [E, out, in] and scales [E, out, blocks]; of four bits with data [E, out, in / 2] as
    `GroupedWeight.pairs`, and scales (and minimums) [E, out, groups]."""

    gate_up: tuple[LinearWeight, ...]  # H -> 2F, the gate first
    down: tuple[LinearWeight, ...]  # F -> H
    # The experts that are here, of those that the router chooses from. None: all
    held: range | None = None


class CacheScales(NamedTuple):
    """What the numbers of a layer's cache in FP8 are multiplied with to give keys and values. Other
    caches hold keys and values themselves."""

    key: float = 1.0
    value: float = 1.0


UNSCALED = CacheScales()


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A whole decoder layer; engine/models/layers.py says what is done with each."""

    input_norm: Tensor | None  # [H] float32; None: the input is normalised already
    post_norm: Tensor  # [H] float32
    eps: float
    qkv: LinearWeight
    output: LinearWeight
    gate_up: LinearWeight
    down: LinearWeight
    cos_sin: Tensor  # [max_len, D] float32
    scale: float
    cache: torch.dtype  # of keys and values
    cache_scales: CacheScales


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """Where the keys of each packed query lie.

    Row b owns queries cu_q[b] .. cu_q[b+1]-1. They attend to cache positions
    first_keys[b] .. prefix_lens[b]-1 without a mask, and to the row's own suffix, whose KV was
    written to cache positions prefix_lens[b] + i. `ancestors[t]` is a bit mask over suffix entries:
    bit i set means that query t sees entry i. Its own bit is set, unless nothing reads its result;
    entries may come from an earlier forward. A mask of 0 means causal, as in a prefill chunk, which
    may be longer than 64. Position p of row b lies at slot block_tables[b, p // S] * S + p % S.
    All tensors are contiguous, except that the rows of block_tables may lie apart.
    """

    cu_q: Tensor  # [B + 1] int32
    prefix_lens: Tensor  # [B] int32
    first_keys: Tensor  # [B] int32, at most prefix_lens; 0 without a window
    block_tables: Tensor  # [B, max_blocks] int32
    ancestors: Tensor  # [T] int64
    max_q: int
    max_context: int  # a bound of the keys that a row sees


class PackedLayer(Protocol):
    """A decoder layer's weights, ready for `Ops.decoder_layers`."""

    address: int  # of its structure in memory


@dataclass(frozen=True, slots=True)
class Backend:
    """The implementation of an operation."""

    name: str  # "reference" | "native" | "triton" | "cublas"
    # Why the slower reference is used, or special instructions ("amx")
    reason: str | None = None

    def __str__(self) -> str:
        return self.name if self.reason is None else f"{self.name} ({self.reason})"


@dataclass(frozen=True, slots=True)
class Ops:
    """All operations, and the backend of each."""

    # (weight [N, K] of the storage dtype, or quantised in a form of `reads`; bias [N] or None)
    pack_linear: Callable[[Part, Tensor | None], LinearWeight]
    # (x [T, K], weight) -> [T, N] in x's dtype
    linear: Callable[[Tensor, LinearWeight], Tensor]
    # (ids [T] int64, weight) -> [T, K] in activation dtype: rows of a packed (tied) weight
    embedding: Callable[[Tensor, LinearWeight], Tensor]
    # (x [T, H], weight [H] float32, eps) -> [T, H]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    # (x [T, H], residual [T, H], weight [H] float32, eps) -> [T, H]; residual += x, in place
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    # (qkv [T, (Hq + 2 Hkv) D], cos_sin [max_len, D] float32, positions [T] int64, slots [T] int64,
    #  k_cache, v_cache [num_blocks, S, Hkv, D], scales of these) -> rotated q [T, Hq, D]; k and v
    # go to the cache
    rope_kv_write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, CacheScales], Tensor]
    # (q [T, Hq, D], k_cache, v_cache, meta, scale, scales of the caches) -> [T, Hq * D]
    attention: Callable[[Tensor, Tensor, Tensor, AttentionMeta, float, CacheScales], Tensor]
    # (pages of all layers, each [num_blocks, S, Hkv, D]; sources [M] int64, targets [M] int64):
    # slot targets[m] takes what slot sources[m] holds, for m in order
    kv_move: Callable[[Sequence[Tensor], Tensor, Tensor], None]
    # (gate_up [T, 2F], gate first) -> [T, F] silu(gate) * up
    silu_and_mul: Callable[[Tensor], Tensor]
    # (x [T, H], router logits [T, E], experts) -> [T, H], zeros for tokens whose expert is not
    # held; see kernels/moe/reference.py
    moe: Callable[[Tensor, Tensor, ExpertWeights], Tensor]
    # (logits [R, V] float32) -> [R] int64
    argmax: Callable[[Tensor], Tensor]
    # (logits [R, V] float32, edits) -> [R, V] a copy after penalties and bias. See
    # kernels/sampling/edit/reference.py
    edit_logits: Callable[[Tensor, LogitEdits], Tensor]
    # (edited logits [R, V] float32, settings) -> [R] int64 tokens. The logits stay unchanged
    draw: Callable[[Tensor, DrawSettings], Tensor]
    # (logits [R, V] float32) -> [R] bool: whether no logit is NaN or +inf, and one is finite
    are_sound: Callable[[Tensor], Tensor]
    # (draft logits [R, V] float32, settings, target's ids [V] int64 or None) -> [R, V] float32 to
    # rank drafts by, noise included; see kernels/sampling/rank/noisy_reference.py
    add_noise: Callable[[Tensor, DrawSettings, Tensor | None], Tensor]
    # (draft logits [R, V] of any float type, how the target draws the tokens after R nodes, its ids
    # [V] int64 or None, count, whether scores are wanted) -> the best tokens after each node; see
    # kernels/sampling/rank/ranking.py
    rank_drafts: Callable[[Tensor, NodeDraws, Tensor | None, int, bool], Ranked]
    # (logits [S, V] float32, tokens [S] int64, n) -> log-probabilities of the tokens and of the n
    # best under the raw logits
    score: Callable[[Tensor, Tensor, int], Scores]
    # (candidates' tokens, parents, scores [B, C], root tokens [B], limits [B] int64, N) -> tokens,
    # parents [B, N]: of row b the root and its best limits[b] - 1 candidates, -1 after these
    tree_select: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    # (parents [B, N] int64) -> ancestor masks and depths [B, N] int64
    tree_ancestors: Callable[[Tensor], tuple[Tensor, Tensor]]
    # (tokens, parents, drawn [B, N] int64, max_depth) -> path [B, max_depth + 1], accepted [B],
    # emitted [B, max_depth + 1]
    tree_walk: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    # (roots, and what is kept of lines) -> which rows can draft; see kernels/drafting/reference.py
    ready_roots: Callable[[RootStates], ReadyRoots]
    # (first entries [L] int32, lines [B], prefix lengths [B], window or None) -> [B] int32, the
    # first entry that each row of a draft head attends to
    first_keys: Callable[[Tensor, Tensor, Tensor, int | None], Tensor]
    # (kept states [L, H], their positions [L]; lines [B], states [C, H], last entry of each row
    # [B], its position [B]): keep, in place, the states of the last entries
    keep_states: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    # (nodes, rows) -> positions, slots and masks of the nodes, for the forwards of a draft head
    lay_levels: Callable[[LevelNodes, RowPlaces], LaidNodes]
    # (tokens and log-probabilities [B, K, k], frontier of K nodes or None, own bits [B * k] or
    # None, candidates, their first column) -> the next frontier; its children become candidates
    grow_level: Callable[
        [Tensor, Tensor, Frontier | None, Tensor | None, Candidates, int], Frontier | None
    ]
    # In which forms weights may stay quantised: q4 and q8 (integers in groups), fp8
    reads: frozenset[str]
    stacks_experts: bool  # whether `moe` reads all experts as one tensor
    activation_dtype: torch.dtype
    backends: dict[str, Backend]  # by operation

    # Operations that join others. None: the engine composes them of the others, or of torch

    # (weights of a layer) -> the same, ready for `decoder_layers`
    pack_layer: Callable[[LayerWeights], PackedLayer] | None = None
    # (layers, x [T, H], residual [T, H], positions [T] int64, slots [T] int64, meta, k_cache and
    # v_cache of each, taps) -> [T, H], not yet added to the residual, which is changed in place:
    # bit for bit what the operations of all layers give in turn. Tensors [T, H] in `taps` take the
    # stream that enters the layers of these places
    decoder_layers: Callable[..., Tensor] | None = None
    # (entries, embedding) -> what the first layer of an EAGLE-3 head reads [C, 2H], and the
    # residual stream [C, H]
    enter_head: Callable[[HeadInput, LinearWeight], tuple[Tensor, Tensor]] | None = None
    # (rows) -> their roots and block tables
    start_rows: Callable[[LineRows], StartedRows] | None = None
    # (trees) -> their nodes, packed
    pack_nodes: Callable[[NodeTrees], PackedNodes] | None = None
    # (trees) -> the walks down them
    settle: Callable[[DrawnTrees], SettledTrees] | None = None
    # (walks) -> what they emitted, packed for a draft head
    pack_entries: Callable[[Walks], PackedEntries] | None = None
