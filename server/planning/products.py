"""The matrices that a GPU holds and multiplies with: memory and time are counted from one list."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import comb

from engine.parallel.shard import Shard
from server.planning.formats import Format
from server.planning.sizes import Experts, ModelSizes

FLOAT32 = 4  # bytes: norms, biases, rotary tables


@dataclass(frozen=True, slots=True)
class Product:
    """`count` layers' matrices of one kind, the part of one GPU."""

    part: str
    inputs: int
    outputs: int
    kept: Format
    count: int = 1
    copies: int = 1  # matrices of a layer of which a token uses some
    used: int = 1  # by one token
    holders: int = 1  # GPUs that each hold other copies

    @property
    def num_bytes(self) -> int:
        """Of all layers and copies."""
        per_output = self.inputs * self.kept.bytes_per_weight + self.kept.bytes_per_output
        return int(self.count * self.copies * self.outputs * per_output)

    def touched(self, num_tokens: int) -> float:
        """The expected number of copies that `num_tokens` tokens use on a GPU, if each takes any
        copy with the same chance; real routers prefer some, and touch fewer. Where GPUs hold other
        copies, on the one that uses most: the others wait for it."""
        chance = 1 - (1 - self.used / (self.copies * self.holders)) ** num_tokens
        if self.holders == 1:
            return self.copies * chance
        return max(1.0, largest_of(self.holders, self.copies, chance))

    def tokens(self, num_tokens: float) -> float:
        """Those that the GPU with most of them multiplies, each as often as it uses copies."""
        evenly = num_tokens * self.used / self.holders
        if self.holders == 1:
            return evenly
        alone = replace(self, copies=self.copies * self.holders, holders=1)
        share = alone.touched(round(num_tokens)) / self.holders
        return evenly * self.touched(round(num_tokens)) / share


def largest_of(number: int, trials: int, chance: float) -> float:
    """The expected largest of `number` binomial counts, as if they were independent."""
    at_most, expected = 0.0, 0.0
    for successes in range(trials):
        others = chance**successes * (1 - chance) ** (trials - successes)
        at_most += comb(trials, successes) * others
        expected += 1 - min(at_most, 1.0) ** number
    return expected


@dataclass(frozen=True, slots=True)
class HeadSizes:
    """A draft head of the EAGLE family."""

    layers: ModelSizes  # its decoder layers; `vocab_size` is the target's
    first_inputs: int  # of q, k and v of layer 0, in hidden sizes: 2 in EAGLE-3
    feature_inputs: int  # of `fc`; 0: there is none
    draft_vocab_size: int
    owns_lm_head: bool  # not the target's
    owns_embedding: bool
    norm_values: int  # of all its norms
    token_table: bool  # which target tokens the draft vocabulary means
    fc_bias: bool = False
    replicated: bool = False  # whole layers on every GPU


def layer_products(sizes: ModelSizes, ranks: int) -> list[Product]:
    """Of all decoder layers of a model on the first of `ranks` GPUs."""
    kept, hidden, experts = sizes.formats, sizes.hidden_size, sizes.experts
    queries = sizes.num_heads // ranks * sizes.head_dim
    keys = Shard(0, ranks).num_kv_heads(sizes.num_kv_heads) * sizes.head_dim
    count = sizes.num_layers
    found = [
        Product("attention", hidden, queries + 2 * keys, kept.attention, count),
        Product("attention", queries, hidden, kept.attention, count),
    ]
    if sizes.num_dense_layers:
        dense = (sizes.dense_width // ranks, kept.dense, sizes.num_dense_layers)
        found += _gated("feed-forward", hidden, *dense)
    return found + (_expert_products(sizes, experts, ranks) if experts else [])


def _expert_products(sizes: ModelSizes, experts: Experts, ranks: int) -> list[Product]:
    hidden, count, width = sizes.hidden_size, experts.num_layers, experts.width // ranks
    kept, holders = sizes.formats, ranks if experts.whole else 1
    copies, own = experts.num_experts // holders, width * holders
    chosen = [
        replace(product, copies=copies, used=experts.per_token, holders=holders)
        for product in _gated("experts", hidden, own, kept.experts, count)
    ]
    return [
        Product("router", hidden, experts.num_experts, kept.router, count),
        *_gated("shared expert", hidden, width, kept.shared, count),
        *chosen,
    ]


def _gated(part: str, hidden: int, width: int, kept: Format, count: int) -> list[Product]:
    return [
        Product(part, hidden, 2 * width, kept, count),
        Product(part, width, hidden, kept, count),
    ]


def vocabulary(sizes: ModelSizes, ranks: int) -> Product:
    """The LM head; the embedding has the same size."""
    rows = Shard(0, ranks).padded_width(sizes.vocab_size)
    return Product("LM head", sizes.hidden_size, rows, sizes.formats.vocabulary)


def head_layer_products(head: HeadSizes, ranks: int) -> list[Product]:
    """Of one pass of a draft head, without its LM head and `fc`."""
    cut = 1 if head.replicated else ranks
    first, *others = layer_products(head.layers, cut)
    more = (head.first_inputs - 1) * head.layers.hidden_size
    wide = replace(first, inputs=first.inputs + more, count=1)
    rest = [replace(first, count=first.count - 1)] if first.count > 1 else []
    return [replace(each, part="draft layers") for each in (wide, *rest, *others)]


def head_lm_head(head: HeadSizes, ranks: int) -> Product:
    rows = Shard(0, ranks).padded_width(head.draft_vocab_size)
    kept = head.layers.formats.vocabulary
    return Product("draft LM head", head.layers.hidden_size, rows, kept)


def head_fc(head: HeadSizes, ranks: int) -> Product | None:
    """The layer that joins features and embedding."""
    if not head.feature_inputs:
        return None
    rows = Shard(0, 1 if head.replicated else ranks).padded_width(head.layers.hidden_size)
    return Product("draft layers", head.feature_inputs, rows, head.layers.formats.vocabulary)


def matrix_bytes(products: Iterable[Product]) -> int:
    return sum(product.num_bytes for product in products)


def bias_bytes(sizes: ModelSizes, ranks: int) -> int:
    """Of the first GPU, which alone adds those of partial outputs."""
    hidden, width = sizes.hidden_size, sizes.dense_width // ranks
    queries = sizes.num_heads // ranks * sizes.head_dim
    keys = Shard(0, ranks).num_kv_heads(sizes.num_kv_heads) * sizes.head_dim
    attention = (queries + 2 * keys + hidden) if sizes.attention_bias else 0
    mlp = (2 * width + hidden) if sizes.mlp_bias else 0
    return FLOAT32 * sizes.num_layers * (attention + mlp)
