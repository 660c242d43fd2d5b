"""What is measured of each operation: shapes of Llama-3.1-8B, bfloat16.

Bytes are what must be read and written at least once; weights of a norm and the like are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.spec.shape import ancestors_of, signed
from kernels.ops import AttentionMeta, Ops
from kernels.sampling.pipeline_reference import DrawSettings, LogitEdits

HEADS, KV_HEADS, D, H, FEED_FORWARD, VOCAB = 32, 8, 128, 4096, 14336, 128256
BLOCK = 16
TOKENS = 8192
LAYERS = 32
# 16 nodes: three children of the root, then thinner
TREE = (-1, 0, 0, 0, 1, 1, 2, 4, 4, 5, 7, 7, 8, 10, 10, 13)


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape. `make` allocates, and gives what is timed."""

    name: str
    num_bytes: int
    make: Callable[[], Callable[[], object]]
    at_most: float | None = None  # times the floor


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
        """(rows, context, tree nodes, bar)"""
        barred = [(64, 8192, 1, 1 / 0.8), (1, 8192, 1, 2.0), (1, 131072, 1, 1.3)]
        free = [(rows, 8192, nodes, None) for rows in (1, 4, 16) for nodes in (1, 8, 16)]
        for rows, context, nodes, bar in (*barred, *free):
            num_bytes = 2 * rows * context * KV_HEADS * D * 2
            name = f"attention, {rows} x {nodes} nodes, context {context}"
            yield Case(name, num_bytes, self._attention(rows, context, nodes), bar)
            if nodes == 1:
                yield Case(f"torch sdpa of {name}", num_bytes, self._sdpa(rows, context))

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
            return lambda: self.ops.attention(queries, keys, values, meta, D**-0.5)

        return make

    def _sdpa(self, rows: int, context: int) -> Callable[[], Callable[[], object]]:
        """torch's own over contiguous keys."""

        def make() -> Callable[[], object]:
            keys, values = (self._new(rows, KV_HEADS, context, D) for _ in range(2))
            queries = self._new(rows, HEADS, 1, D)
            return lambda: F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)

        return make

    def row_cases(self) -> Iterator[Case]:
        """Operations on rows of hidden states."""
        T, bar = TOKENS, 1 / 0.8
        x, weight = self._new(T, H), self._new(H, dtype=torch.float32)
        residual, gate_up = self._new(T, H), self._new(T, 2 * FEED_FORWARD)
        yield Case("rms_norm", 4 * T * H, lambda: lambda: self.ops.rms_norm(x, weight, 1e-5), bar)
        yield Case(
            "add_rms_norm",
            8 * T * H,
            lambda: lambda: self.ops.add_rms_norm(x, residual, weight, 1e-5),
            bar,
        )
        yield Case(
            "silu_and_mul",
            6 * T * FEED_FORWARD,
            lambda: lambda: self.ops.silu_and_mul(gate_up),
            bar,
        )
        qkv_bytes = 4 * T * (HEADS + 2 * KV_HEADS) * D
        yield Case("rope_kv_write", qkv_bytes, self._rope, bar)
        moved = 2 * LAYERS * 256 * KV_HEADS * D * 2
        yield Case("kv_move, 256 slots of 32 layers", 2 * moved, self._kv_move, bar)
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
        return lambda: self.ops.rope_kv_write(qkv, angles, at, slots, keys, values)

    def _kv_move(self) -> Callable[[], object]:
        pages = [self._new(1024, BLOCK, KV_HEADS, D) for _ in range(2 * LAYERS)]
        slots = torch.randperm(1024 * BLOCK, device=self.device)
        sources, targets = slots[:256].contiguous(), slots[256:512].contiguous()
        return lambda: self.ops.kv_move(pages, sources, targets)

    def sampling_cases(self) -> Iterator[Case]:
        R = 64
        logits = self._new(R, VOCAB, dtype=torch.float32) * 3
        keys = torch.randint(2**62, (R,), device=self.device)
        read = 4 * R * VOCAB
        yield Case("argmax", read, lambda: lambda: self.ops.argmax(logits))
        yield Case("logsumexp", read, lambda: lambda: self.ops.logsumexp(logits))
        yield Case("gumbel_argmax", read, lambda: lambda: self.ops.gumbel_argmax(logits, keys))
        greedy = self._settings(R, 0.0)
        yield Case("draw, greedy", read, lambda: lambda: self.ops.draw(logits, greedy))
        whole = self._settings(R, 1.0)
        yield Case("draw, temperature 1", read, lambda: lambda: self.ops.draw(logits, whole))
        edited = self._settings(R, 1.0, top_p=0.9)
        yield Case(
            "draw, top-p 0.9 and penalties",
            read,
            lambda: lambda: self.ops.draw(logits, edited),
            4.0,
        )

    def _settings(self, R: int, temperature: float, top_p: float | None = None) -> DrawSettings:
        def row(value: float) -> Tensor:
            return torch.full((R,), value, device=self.device)

        order = torch.arange(R, device=self.device)
        ids = torch.stack([torch.randperm(VOCAB, device=self.device)[:512] for _ in range(R)])
        edits = LogitEdits(
            offsets=torch.arange(R + 1, device=self.device).int() * 512,
            ids=ids.flatten().int(),
            counts=torch.ones(R * 512, dtype=torch.int32, device=self.device),
            bias=torch.zeros(R * 512, device=self.device),
            repetition=row(1.1),
            frequency=row(0.2),
            presence=row(0.1),
        )
        return DrawSettings(
            temperature=row(temperature),
            seeds=order,
            positions=order + 1000,
            top_p=None if top_p is None else row(top_p),
            edits=None if top_p is None else edits,
        )

    def tree_cases(self) -> Iterator[Case]:
        """No bytes to speak of: the time is what launches take."""
        B, k, C, N = 16, 10, 410, 60
        above, local = self._new(B, k, dtype=torch.float32), self._new(B, k, k, dtype=torch.float32)
        tokens = torch.randint(VOCAB, (B, C), device=self.device)
        parents = (torch.arange(C, device=self.device) - k).clamp(min=-1).expand(B, C).contiguous()
        scores = self._new(B, C, dtype=torch.float32).sort(dim=1, descending=True).values
        trees = torch.arange(-1, N - 1, device=self.device).expand(B, N).contiguous()
        drawn = tokens[:, :N].contiguous()
        roots = tokens[:, 0].contiguous()
        ops = self.ops
        yield Case("tree_expand", 0, lambda: lambda: ops.tree_expand(above, local, k))
        yield Case(
            "tree_select", 0, lambda: lambda: ops.tree_select(tokens, parents, scores, roots, N)
        )
        yield Case("tree_ancestors", 0, lambda: lambda: ops.tree_ancestors(trees))
        yield Case("tree_walk", 0, lambda: lambda: ops.tree_walk(drawn, trees, drawn, N - 1))
