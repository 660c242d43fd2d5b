"""The measured cases of each operation: shapes of Llama-3.1-8B, bfloat16.

Bytes are those that must be read or written at least once, without small ones such as norm weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from engine.step.shape import ancestors_of, signed
from kernels.drafting.nodes import Candidates, Frontier
from kernels.ops import UNSCALED, AttentionMeta, Ops
from kernels.sampling.settings import BiasEntries, DrawSettings, LogitEdits, Penalties

HEADS, KV_HEADS, D, H, FEED_FORWARD, VOCAB = 32, 8, 128, 4096, 14336, 128256
BLOCK = 16
TOKENS = 8192
LAYERS = 32
# 16 nodes: three children of the root, fewer below
TREE = (-1, 0, 0, 0, 1, 1, 2, 4, 4, 5, 7, 7, 8, 10, 10, 13)


FLOOR = "floor"
MEMORY_SPEED = 1 / 0.8  # times the floor: four fifths of the speed of a copy


@dataclass(frozen=True, slots=True)
class Bar:
    """At most `times` the time of `of`: the floor or an earlier case."""

    times: float
    of: str = FLOOR


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape. `make` allocates and returns the function to time."""

    name: str
    num_bytes: int
    make: Callable[[], Callable[[], object]]
    bars: tuple[Bar, ...] = ()
    is_peer: bool = False  # another library's, for comparison; it may fail


def all_cases(ops: Ops, device: torch.device) -> Iterator[Case]:
    lab = _Lab(ops, device)
    yield from lab.attention_cases()
    yield from lab.row_cases()
    yield from lab.sampling_cases()
    yield from lab.tree_cases()


@dataclass(frozen=True, slots=True)
class _Lab:
    ops: Ops
    device: torch.device

    def _new(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def attention_cases(self) -> Iterator[Case]:
        """Each shape must beat torch's attention over contiguous keys, which comes first; trees
        are also compared with one node."""
        floors = {(64, 8192): MEMORY_SPEED, (1, 8192): 2.0, (1, 131072): 1.3}
        for rows, context in (*floors, (4, 8192), (16, 8192)):
            for nodes in (1, 8, 16) if context == 8192 and rows <= 16 else (1,):
                shape = f"{rows} x {nodes} nodes, context {context}"
                num_bytes = 2 * rows * context * KV_HEADS * D * 2
                peers = {"sdpa": self._sdpa, "flex_attention": self._flex}
                bars = [Bar(1.0, f"torch {peer}, {shape}") for peer in peers]
                for peer, make in peers.items():
                    made = make(rows, context, nodes)
                    yield Case(f"torch {peer}, {shape}", num_bytes, made, is_peer=True)
                if nodes == 16:
                    bars.append(Bar(1.15, f"attention, {rows} x 1 nodes, context {context}"))
                if nodes == 1 and (rows, context) in floors:
                    bars.append(Bar(floors[rows, context]))
                own = self._attention(rows, context, nodes)
                yield Case(f"attention, {shape}", num_bytes, own, tuple(bars))

    def _attention(self, rows: int, context: int, nodes: int) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            per_row = -(-(context + nodes) // BLOCK)
            tables = torch.randperm(rows * per_row, device=self.device).int().view(rows, per_row)
            keys, values = (self._new(rows * per_row, BLOCK, KV_HEADS, D) for _ in range(2))
            masks = [signed(mask) for mask in ancestors_of(TREE[:nodes])]
            meta = AttentionMeta(
                cu_q=torch.arange(rows + 1, device=self.device).int() * nodes,
                prefix_lens=torch.full((rows,), context, device=self.device).int(),
                first_keys=torch.zeros(rows, dtype=torch.int32, device=self.device),
                block_tables=tables,
                ancestors=torch.tensor(masks * rows, device=self.device),
                max_q=nodes,
                max_context=context + nodes,
            )
            queries = self._new(rows * nodes, HEADS, D)
            return lambda: self.ops.attention(queries, keys, values, meta, D**-0.5, UNSCALED)

        return make

    def _contiguous(self, rows: int, context: int, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in torch's layout, the nodes' keys after the context."""
        keys, values = (self._new(rows, KV_HEADS, context + nodes, D) for _ in range(2))
        return self._new(rows, HEADS, nodes, D), keys, values

    def _visible(self, context: int, nodes: int) -> Tensor:
        """[nodes, context + nodes] bool: the context and each node's ancestors."""
        masks = torch.tensor(ancestors_of(TREE[:nodes]), device=self.device)
        own = (masks[:, None] >> torch.arange(nodes, device=self.device)) & 1
        return F.pad(own.bool(), (context, 0), value=True)

    def _sdpa(self, rows: int, context: int, nodes: int) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            q, k, v = self._contiguous(rows, context, nodes)
            mask = None if nodes == 1 else self._visible(context, nodes)
            return lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

        return make

    def _flex(self, rows: int, context: int, nodes: int) -> Callable[[], Callable[[], object]]:
        """Compiled for the shape, as users of flex_attention do."""

        def make() -> Callable[[], object]:
            q, k, v = self._contiguous(rows, context, nodes)
            visible = self._visible(context, nodes)

            def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return visible[query, key]

            mask = create_block_mask(sees, None, None, nodes, context + nodes, self.device)
            run = torch.compile(flex_attention, dynamic=False)
            return lambda: run(q, k, v, block_mask=mask, enable_gqa=True)

        return make

    def row_cases(self) -> Iterator[Case]:
        """Operations on rows of hidden states."""
        T, bars = TOKENS, (Bar(MEMORY_SPEED),)
        x, weight = self._new(T, H), self._new(H, dtype=torch.float32)
        residual, gate_up = self._new(T, H), self._new(T, 2 * FEED_FORWARD)
        yield Case("rms_norm", 4 * T * H, lambda: lambda: self.ops.rms_norm(x, weight, 1e-5), bars)
        yield Case(
            "add_rms_norm",
            8 * T * H,
            lambda: lambda: self.ops.add_rms_norm(x, residual, weight, 1e-5),
            bars,
        )
        yield Case(
            "silu_and_mul",
            6 * T * FEED_FORWARD,
            lambda: lambda: self.ops.silu_and_mul(gate_up),
            bars,
        )
        qkv_bytes = 4 * T * (HEADS + 2 * KV_HEADS) * D
        yield Case("rope_kv_write", qkv_bytes, self._rope, bars)
        moved = 2 * LAYERS * 256 * KV_HEADS * D * 2
        yield Case("kv_move, 256 slots of 32 layers", 2 * moved, self._kv_move, bars)
        packed = self.ops.pack_linear(self._new(VOCAB, H), None)
        ids = torch.randint(VOCAB, (T,), device=self.device)
        yield Case("embedding", 4 * T * H, lambda: lambda: self.ops.embedding(ids, packed))
        for rows in (1, 8):
            few = self._new(rows, H)
            yield Case(
                f"linear to the vocabulary, {rows} rows",
                2 * VOCAB * H,
                lambda few=few: lambda: self.ops.linear(few, packed),  # type: ignore[misc]
            )

    def _rope(self) -> Callable[[], object]:
        blocks = TOKENS // BLOCK
        qkv = self._new(TOKENS, (HEADS + 2 * KV_HEADS) * D)
        keys, values = (self._new(blocks, BLOCK, KV_HEADS, D) for _ in range(2))
        angles = self._new(TOKENS, D, dtype=torch.float32)
        slots, places = torch.randperm(TOKENS, device=self.device), torch.arange(TOKENS)
        at = places.to(self.device)
        return lambda: self.ops.rope_kv_write(qkv, angles, at, slots, keys, values, UNSCALED)

    def _kv_move(self) -> Callable[[], object]:
        pages = [self._new(1024, BLOCK, KV_HEADS, D) for _ in range(2 * LAYERS)]
        slots = torch.randperm(1024 * BLOCK, device=self.device)
        sources, targets = slots[:256].contiguous(), slots[256:512].contiguous()
        return lambda: self.ops.kv_move(pages, sources, targets)

    def sampling_cases(self) -> Iterator[Case]:
        R, ops = 64, self.ops
        logits = self._new(R, VOCAB, dtype=torch.float32) * 3
        read = 4 * R * VOCAB
        yield Case("argmax", read, lambda: lambda: ops.argmax(logits))
        yield from self._edit_cases(logits)
        tokens = torch.arange(R, device=self.device)
        for num_top in (0, 20):
            yield Case(
                f"score, {num_top} alternatives",
                read,
                lambda n=num_top: lambda: ops.score(logits, tokens, n),  # type: ignore[misc]
            )
        greedy, whole = self._settings(R, 0.0), self._settings(R, 1.0)
        yield Case("draw, greedy", read, lambda: lambda: ops.draw(logits, greedy))
        yield Case("draw, temperature 1", read, lambda: lambda: ops.draw(logits, whole))
        filtered = self._settings(R, 1.0, top_p=0.9)
        yield Case("draw, top-p 0.9", read, lambda: lambda: ops.draw(logits, filtered), (Bar(4.0),))
        for name, settings in (("temperature 1", whole), ("top-p 0.9", filtered)):
            yield Case(
                f"add_noise, {name}",
                2 * read,
                lambda chosen=settings: lambda: ops.add_noise(logits, chosen, None),  # type: ignore[misc]
            )

    def _settings(self, R: int, temperature: float, top_p: float | None = None) -> DrawSettings:
        order = torch.arange(R, device=self.device)
        return DrawSettings(
            temperature=self._full(R, temperature),
            seeds=order,
            positions=order + 1000,
            top_p=None if top_p is None else self._full(R, top_p),
        )

    def _full(self, R: int, value: float) -> Tensor:
        return torch.full((R,), value, device=self.device)

    def _edit_cases(self, logits: Tensor) -> Iterator[Case]:
        """Bytes: logits in and out, and counts with penalties."""
        R, ops = len(logits), self.ops
        size = 4 * R * VOCAB
        penalties, bias = self._penalties(R), self._bias(R)
        off = replace(penalties, repetition=self._full(R, 1), frequency=self._full(R, 0))
        positions = torch.full((R,), 1000, device=self.device)
        kinds = {
            "penalties and bias": (3 * size, LogitEdits(positions, penalties, bias)),
            "penalties off": (2 * size, LogitEdits(positions, off)),
            "bias": (2 * size, LogitEdits(positions, None, bias)),
        }
        for kind, (num_bytes, edits) in kinds.items():
            yield Case(
                f"edit_logits, {kind}",
                num_bytes,
                lambda edits=edits: lambda: ops.edit_logits(logits, edits),  # type: ignore[misc]
                (Bar(MEMORY_SPEED),),
            )

    def _penalties(self, R: int) -> Penalties:
        """Texts of 512 different tokens, and tree paths of 7."""
        counts = torch.zeros(R, VOCAB, dtype=torch.int32, device=self.device)
        counts[:, :: VOCAB // 512] = 3
        order = torch.arange(R, device=self.device)
        paths = torch.randint(VOCAB, (R, 7), device=self.device)
        off = self._full(R, 0.0)
        return Penalties(counts, order, paths, self._full(R, 1.1), self._full(R, 0.2), off)

    def _bias(self, R: int) -> BiasEntries:
        """300 entries for every row."""
        order, shape = torch.arange(R, device=self.device), (R, 300)
        ids = torch.randint(VOCAB, shape, device=self.device)
        until = torch.full(shape, 2**62, device=self.device)
        return BiasEntries(order, ids, torch.ones(shape, device=self.device), until)

    def tree_cases(self) -> Iterator[Case]:
        """Hardly any bytes: the time is that of the launches."""
        B, k, C, N = 16, 10, 410, 60
        local = self._new(B, k, k, dtype=torch.float32)
        children = torch.randint(VOCAB, (B, k, k), device=self.device)
        above = torch.arange(B * k, device=self.device).view(B, k)
        tokens = torch.randint(VOCAB, (B, C), device=self.device)
        parents = (torch.arange(C, device=self.device) - k).clamp(min=-1).expand(B, C).contiguous()
        scores = self._new(B, C, dtype=torch.float32).sort(dim=1, descending=True).values
        trees = torch.arange(-1, N - 1, device=self.device).expand(B, N).contiguous()
        drawn = tokens[:, :N].contiguous()
        roots = tokens[:, 0].contiguous()
        limits = torch.full((B,), N, device=self.device)
        room = Candidates(tokens.clone(), parents.clone(), scores.clone())
        frontier = Frontier(above, local[:, :, 0].contiguous(), above, above, above.flatten())
        ops = self.ops
        yield Case(
            "grow_level",
            0,
            lambda: lambda: ops.grow_level(children, local, frontier, above.flatten(), room, k),
        )
        yield Case(
            "tree_select",
            0,
            lambda: lambda: ops.tree_select(tokens, parents, scores, roots, limits, N),
        )
        yield Case("tree_ancestors", 0, lambda: lambda: ops.tree_ancestors(trees))
        yield Case("tree_walk", 0, lambda: lambda: ops.tree_walk(drawn, trees, drawn, N - 1))
