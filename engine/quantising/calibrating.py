"""Quantises a Llama layer by layer, from what its products read while it runs over some texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.manifest import EMBEDDING
from engine.checkpoints.stored import ReadStored, Stored
from engine.kv.storage import KVStorage
from engine.models.layers import DecoderLayer
from engine.models.loading import LayerLoader
from engine.models.place import Place
from engine.quantising.rounding import Rounded
from engine.step.batch import ForwardBatch, ForwardContext
from engine.step.group import TPGroup
from engine.step.texts import BLOCK_SIZE, batch_of, blocks_of
from kernels.linear.quantised import dense
from kernels.ops import LinearWeight, Ops

Texts = Sequence[Sequence[int]]
# From the name of the first weight, all that read the same inputs [N, K], and x^T x of these
RoundWeight = Callable[[str, Tensor, Tensor], Rounded]
# The products of a layer, each with the weights that read its inputs
PRODUCTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(slots=True)
class Stream:
    """One text on its way through the layers."""

    batch: ForwardBatch
    residual: Tensor  # [T, H]
    added: Tensor | None = None  # output of the layer before, not yet added


@dataclass(frozen=True, slots=True)
class InputSums:
    """Products that also sum x^T x of what some of them read."""

    ops: Ops
    sums: Mapping[int, Tensor]  # [K, K] float32, by the identity of the weight

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        found = self.sums.get(id(weight))
        if found is not None:
            rows = x.float()
            found.addmm_(rows.T, rows)
        return self.ops.linear(x, weight)


@dataclass(frozen=True, slots=True)
class Run:
    """The texts of a calibration, and with what they are computed."""

    arch: LlamaArch
    read: ReadStored
    place: Place
    longest: int  # tokens
    kv: KVStorage
    streams: list[Stream]

    def layer(self, prefix: str, found: Mapping[str, Rounded]) -> DecoderLayer:
        """With the weights of `found` instead of those in the files. It is the only one in its
        cache."""

        def read(name: str) -> Stored:
            return found[name].numbers.cpu() if name in found else self.read(name)

        blocks = LayerLoader.of(self.arch, read, self.place, self.longest)
        return blocks.decoder_layer(0, prefix)

    def input_sums(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """x^T x of what each product reads, by its name in PRODUCTS."""
        weights = {product: getattr(layer.weights, product) for product in PRODUCTS}
        sums = {
            product: torch.zeros((weight.in_features,) * 2, device=self.place.device)
            for product, weight in weights.items()
        }
        by_weight = {id(weights[product]): total for product, total in sums.items()}
        ops = replace(self.place.ops, linear=InputSums(self.place.ops, by_weight).linear)
        for stream in self.streams:
            added = None if stream.added is None else stream.added.clone()
            layer(added, stream.residual.clone(), stream.batch, self._context(ops))
        return sums

    def advance(self, layer: DecoderLayer) -> None:
        """Every text through one more layer."""
        for stream in self.streams:
            ctx = self._context(self.place.ops)
            stream.added = layer(stream.added, stream.residual, stream.batch, ctx)

    def _context(self, ops: Ops) -> ForwardContext:
        return ForwardContext(ops, self.kv, TPGroup())

    def quantised(self, prefix: str, round_weight: RoundWeight) -> dict[str, Rounded]:
        """The linear weights of a layer by name."""
        sums = self.input_sums(self.layer(prefix, {}))
        found: dict[str, Rounded] = {}
        for product, parts in PRODUCTS.items():
            names = [f"{prefix}.{part}.weight" for part in parts]
            weights = [dense(self.read(name)[:]) for name in names]
            both = torch.cat(weights).to(self.place.device, torch.float32)
            rounded = round_weight(names[0], both, sums[product])
            found |= dict(zip(names, rounded.split([len(each) for each in weights]), strict=True))
        return found


@torch.no_grad()
def quantised_layers(
    arch: LlamaArch, read: ReadStored, place: Place, texts: Texts, round_weight: RoundWeight
) -> Iterator[dict[str, Rounded]]:
    """The linear weights of each decoder layer by name. A layer reads what the quantised ones
    before it compute. Holds one layer at a time, besides the activations of all texts."""
    ops = replace(place.ops, pack_layer=None, decoder_layers=None)
    place = replace(place, ops=ops, weights="plain")
    embedding = dense(read(EMBEDDING)[:]).to(place.device, place.dtype)
    batches = [batch_of([text], place.device) for text in texts]
    streams = [Stream(batch, embedding[batch.token_ids]) for batch in batches]
    run = Run(arch, read, place, max(map(len, texts)), _pages(arch, place, texts), streams)
    for index in range(arch.num_layers):
        prefix = f"model.layers.{index}"
        found = run.quantised(prefix, round_weight)
        yield found
        run.advance(run.layer(prefix, found))


def _pages(arch: LlamaArch, place: Place, texts: Texts) -> KVStorage:
    """For one layer and the longest text."""
    return KVStorage.allocate(
        1,
        blocks_of([max(texts, key=len)]),
        BLOCK_SIZE,
        arch.num_kv_heads,
        arch.head_dim,
        place.dtype,
        place.device,
    )
