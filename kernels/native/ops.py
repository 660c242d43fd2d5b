"""The operation table of the native CPU kernels. Activations are float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kernels.linear.grouped import GROUP, GroupedWeight
from kernels.linear.quantised import Part, dense
from kernels.native.layer import (
    ENDINGS,
    SUFFIXES,
    LatestBatch,
    LatestPages,
    NativeLayer,
    addresses,
    cache_functions,
    check_heads,
    inverses,
)
from kernels.native.library import NativeLibrary, pointer
from kernels.native.memory import HugePages
from kernels.ops import (
    UNSCALED,
    AttentionMeta,
    Backend,
    CacheScales,
    ExpertWeights,
    LayerWeights,
    LinearWeight,
    PackedLayer,
)
from kernels.sampling.reference import noise_keys
from kernels.sampling.settings import DrawSettings


class NativeOps:
    """Calls the C functions. They read raw memory: inputs that are not contiguous are copied first;
    tensors changed in place (residual, pages) must be contiguous."""

    def __init__(self, library: NativeLibrary, storage_dtype: torch.dtype, input_bits: int) -> None:
        """`input_bits`: 8 or 16, see `build_ops`."""
        suffix = SUFFIXES[storage_dtype]
        instructions = library.instructions if storage_dtype is torch.bfloat16 else None
        products = suffix + ENDINGS[instructions]
        self.library = library  # keeps the thread pool alive
        # With special instructions, these operations round their inputs to bfloat16.
        self.backends = dict.fromkeys(
            ("linear", "attention", "moe"), Backend("native", instructions)
        )
        self._pool = library.pool
        self._memory, self._batches, self._pages = HugePages(), LatestBatch(), LatestPages()
        self._dtype, self._suffix, self._products = storage_dtype, suffix, products
        self._pack = library.call(f"aerie_pack_{suffix}")
        self._linear = library.call(f"aerie_linear_{products}")
        self._embedding = library.call(f"aerie_embedding_{suffix}")
        self._pack_groups = library.call("aerie_pack_groups")
        self._group_products = f"aerie_linear_groups_{input_bits}"
        self._linear_groups = library.call(self._group_products)
        self._embedding_groups = library.call("aerie_embedding_groups")
        self._decoder_layers = library.call("aerie_decoder_layers")
        self._rms_norm = library.call("aerie_rms_norm")
        self._caches = cache_functions(suffix, products)
        self._rope_kv_write, self._attention = (
            {dtype: library.call(names[place]) for dtype, names in self._caches.items()}
            for place in range(2)
        )
        self._kv_move = library.call("aerie_kv_move")
        self._silu_and_mul = library.call("aerie_silu_and_mul")
        self._route = library.call("aerie_route")
        self._gumbel_argmax = library.call("aerie_gumbel_argmax")
        self._add_noise = library.call("aerie_add_noise")
        self._argmax = library.call("aerie_argmax")
        self._draw = library.call("aerie_draw")
        self._sound = library.call("aerie_sound")
        self._tree_walk = library.call("aerie_tree_walk")
        self._logsumexp = library.call("aerie_logsumexp")

    def pack_linear(self, weight: Part, bias: Tensor | None) -> LinearWeight:
        bias = None if bias is None else bias.float().contiguous()
        if isinstance(weight, GroupedWeight):
            weight = weight.regrouped(GROUP)
            # Of wide scales, the kernels read groups of 32 with minimums only.
            is_read = weight.layout.group < GROUP or not weight.layout.wide_scales
            return self._pack_grouped(weight if is_read else weight.with_minimums(), bias)
        weight = dense(weight).to(self._dtype).contiguous()
        N, K = weight.shape
        size = self.library.number(f"aerie_packed_elements_{self._suffix}", N, K)
        packed = self._memory.empty(size, dtype=self._dtype)
        self._pack(self._pool, weight.data_ptr(), N, K, packed.data_ptr())
        return LinearWeight(packed, bias, N, K)

    def _pack_grouped(self, weight: GroupedWeight, bias: Tensor | None) -> LinearWeight:
        codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
        minimums = None if weight.minimums is None else weight.minimums.contiguous()
        (N, K), layout = codes.shape, weight.layout
        size = self.library.number("aerie_packed_bytes_groups", *layout, N, K)
        packed = self._memory.empty(size, dtype=torch.uint8)
        self._pack_groups(
            self._pool,
            *layout[:3],
            codes.data_ptr(),
            scales.data_ptr(),
            pointer(minimums),
            N,
            K,
            packed.data_ptr(),
        )
        return LinearWeight(packed, bias, N, K, layout)

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        out = torch.empty(len(x), weight.all_features)
        self._linear_into(out, x.contiguous(), weight)
        return out

    def _linear_into(self, out: Tensor, x: Tensor, weight: LinearWeight) -> None:
        """`out` and `x` are contiguous."""
        if weight.layout is None:
            self._multiply(x, weight, out)
            return
        first = 0
        for part in (weight, *weight.more):
            self._multiply_groups(x, part, out, first)
            first += part.out_features

    def _multiply(self, x: Tensor, weight: LinearWeight, out: Tensor) -> None:
        M, K = x.shape
        self._linear(
            self._pool,
            x.data_ptr(),
            M,
            K,
            weight.data.data_ptr(),
            weight.out_features,
            pointer(weight.bias),
            out.data_ptr(),
        )

    def _multiply_groups(self, x: Tensor, weight: LinearWeight, out: Tensor, first: int) -> None:
        """Write the outputs of a quantised weight to the columns of `out` from `first` on."""
        assert weight.layout is not None
        M, K = x.shape
        self._linear_groups(
            self._pool,
            *weight.layout,
            x.data_ptr(),
            M,
            K,
            weight.data.data_ptr(),
            weight.out_features,
            pointer(weight.bias),
            out.data_ptr() + first * out.element_size(),
            out.stride(0),
        )

    def embedding(self, token_ids: Tensor, weight: LinearWeight) -> Tensor:
        token_ids = token_ids.contiguous()
        out = torch.empty(len(token_ids), weight.in_features)
        call, layout = self._embedding, weight.layout or ()
        if weight.layout is not None:
            call = self._embedding_groups
        call(
            self._pool,
            *layout,
            token_ids.data_ptr(),
            len(token_ids),
            weight.data.data_ptr(),
            weight.in_features,
            out.data_ptr(),
        )
        return out

    def pack_layer(self, weights: LayerWeights) -> PackedLayer:
        own = self._caches[weights.cache]
        return NativeLayer(self.library, weights, self._products, self._group_products, own)

    def decoder_layers(
        self,
        layers: Sequence[PackedLayer],
        x: Tensor,
        residual: Tensor,
        positions: Tensor,
        slots: Tensor,
        meta: AttentionMeta,
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
        taps: Mapping[int, Tensor],
    ) -> Tensor:
        assert residual.is_contiguous()
        x, out = x.contiguous(), torch.empty_like(residual)
        batch = self._batches.of(positions, slots, meta)
        self._decoder_layers(
            self._pool,
            addresses([layer.address for layer in layers]),
            len(layers),
            batch.address(k_caches[0].shape[1]),
            x.data_ptr(),
            residual.data_ptr(),
            *self._pages.of(tuple(k_caches), tuple(v_caches)),
            addresses([pointer(taps.get(place)) for place in range(len(layers))]),
            out.data_ptr(),
        )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, None, weight, eps)

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
    ) -> Tensor:
        assert residual.is_contiguous()
        return self._norm(x, residual.data_ptr(), weight, eps)

    def _norm(self, x: Tensor, residual: int | None, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        T, H = x.shape
        self._rms_norm(
            self._pool, x.data_ptr(), residual, weight.data_ptr(), T, H, eps, out.data_ptr()
        )
        return out

    def rope_kv_write(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        positions: Tensor,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scales: CacheScales = UNSCALED,
    ) -> Tensor:
        assert k_cache.is_contiguous()
        assert v_cache.is_contiguous()
        qkv, positions, slots = qkv.contiguous(), positions.contiguous(), slots.contiguous()
        num_kv_heads, head_dim = k_cache.shape[2:]
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        queries = torch.empty(len(qkv), num_heads, head_dim)
        self._rope_kv_write[k_cache.dtype](
            self._pool,
            qkv.data_ptr(),
            len(qkv),
            num_heads,
            num_kv_heads,
            head_dim,
            cos_sin.data_ptr(),
            positions.data_ptr(),
            slots.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            *inverses(scales),
            queries.data_ptr(),
        )
        return queries

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMeta,
        scale: float,
        scales: CacheScales = UNSCALED,
    ) -> Tensor:
        T, num_heads, head_dim = q.shape
        block_size, num_kv_heads = k_cache.shape[1:3]
        check_heads(num_heads, num_kv_heads, head_dim)
        out = torch.empty(T, num_heads * head_dim)
        q, block_tables = q.contiguous(), meta.block_tables.contiguous()
        ancestors = meta.ancestors.contiguous()
        self._attention[k_cache.dtype](
            self._pool,
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            meta.cu_q.data_ptr(),
            meta.prefix_lens.data_ptr(),
            meta.first_keys.data_ptr(),
            len(meta.prefix_lens),
            block_tables.data_ptr(),
            ancestors.data_ptr(),
            block_tables.shape[1],
            block_size,
            num_heads,
            num_kv_heads,
            head_dim,
            scale * scales.key,
            scales.value,
            out.data_ptr(),
        )
        return out

    def kv_move(self, pages: Sequence[Tensor], sources: Tensor, targets: Tensor) -> None:
        assert all(page.is_contiguous() for page in pages)
        sources, targets = sources.contiguous(), targets.contiguous()
        slot_bytes = pages[0].stride(1) * pages[0].element_size()
        self._kv_move(
            self._pool,
            addresses([page.data_ptr() for page in pages]),
            len(pages),
            slot_bytes,
            sources.data_ptr(),
            targets.data_ptr(),
            len(sources),
        )

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        T, width = gate_up.shape
        out = torch.empty(T, width // 2)
        self._silu_and_mul(self._pool, gate_up.data_ptr(), T, width // 2, out.data_ptr())
        return out

    def moe(self, x: Tensor, logits: Tensor, weights: ExpertWeights) -> Tensor:
        """A call of a linear layer for each held expert that has tokens. A token's result does not
        depend on the others, because that of a linear layer does not."""
        x, logits = x.contiguous(), logits.contiguous()
        scaled, experts = torch.empty_like(x), torch.empty(len(x), dtype=torch.int64)
        places = (x.data_ptr(), x.shape[1], experts.data_ptr(), scaled.data_ptr())
        self._route(self._pool, logits.data_ptr(), *logits.shape, *places)
        held = weights.held or range(logits.shape[1])
        counts = experts.bincount(minlength=logits.shape[1]).tolist()
        first, counts = sum(counts[: held.start]), counts[held.start : held.stop]
        order = experts.argsort(stable=True)[first : first + sum(counts)]
        inner = self.silu_and_mul(self._linear_each(scaled[order], counts, weights.gate_up))
        outputs = self._linear_each(inner, counts, weights.down)
        return torch.zeros(len(x), outputs.shape[1]).index_copy_(0, order, outputs)

    def _linear_each(
        self, x: Tensor, counts: Sequence[int], weights: Sequence[LinearWeight]
    ) -> Tensor:
        """The first counts[0] rows times the first weight, and so on."""
        out, first = torch.empty(len(x), weights[0].all_features), 0
        for count, weight in zip(counts, weights, strict=True):
            rows = slice(first, first + count)
            if count:
                self._linear_into(out[rows], x[rows], weight)
            first += count
        return out

    def gumbel_argmax(self, logits: Tensor, keys: Tensor) -> Tensor:
        logits, keys = logits.contiguous(), keys.contiguous()
        tokens = torch.empty(len(logits), dtype=torch.int64)
        self._gumbel_argmax(
            self._pool, logits.data_ptr(), keys.data_ptr(), *logits.shape, tokens.data_ptr()
        )
        return tokens

    def add_noise(self, logits: Tensor, settings: DrawSettings, token_ids: Tensor | None) -> Tensor:
        if not settings.any_sampled:
            return logits
        logits = logits.contiguous()
        out = torch.empty_like(logits)
        filters = [part.contiguous() for part in settings.filters(logits.shape[1])]
        temperature = settings.temperature.contiguous()
        keys = noise_keys(settings.seeds, settings.positions)
        self._add_noise(
            self._pool,
            logits.data_ptr(),
            temperature.data_ptr(),
            keys.data_ptr(),
            pointer(token_ids),
            *(map(pointer, filters) if settings.is_filtered else (None, None, None)),
            *logits.shape,
            out.data_ptr(),
        )
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        logits = logits.contiguous()
        tokens = torch.empty(len(logits), dtype=torch.int64)
        self._argmax(self._pool, logits.data_ptr(), *logits.shape, tokens.data_ptr())
        return tokens

    def draw(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        """As `Ops.draw`, without masks and filters."""
        assert settings.allowed is None
        assert not settings.is_filtered
        logits = logits.contiguous()
        tokens = torch.empty(len(logits), dtype=torch.int64)
        rows = (settings.temperature, settings.seeds, settings.positions)
        rows = tuple(values.contiguous() for values in rows)
        self._draw(
            self._pool,
            logits.data_ptr(),
            *(values.data_ptr() for values in rows),
            *logits.shape,
            tokens.data_ptr(),
        )
        return tokens

    def are_sound(self, logits: Tensor) -> Tensor:
        logits = logits.contiguous()
        found = torch.empty(len(logits), dtype=torch.bool)
        self._sound(self._pool, logits.data_ptr(), *logits.shape, found.data_ptr())
        return found

    def tree_walk(
        self, tokens: Tensor, parents: Tensor, drawn: Tensor, max_depth: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        nodes = (tokens.contiguous(), parents.contiguous(), drawn.contiguous())
        shape = (len(tokens), max_depth + 1)
        path, emitted = torch.empty(2, *shape, dtype=torch.int64).unbind()
        accepted = torch.empty(len(tokens), dtype=torch.int64)
        self._tree_walk(
            self._pool,
            *(values.data_ptr() for values in nodes),
            *tokens.shape,
            max_depth,
            path.data_ptr(),
            accepted.data_ptr(),
            emitted.data_ptr(),
        )
        return path, accepted, emitted

    def logsumexp(self, logits: Tensor) -> Tensor:
        logits = logits.contiguous()
        out = torch.empty(len(logits))
        self._logsumexp(self._pool, logits.data_ptr(), *logits.shape, out.data_ptr())
        return out
