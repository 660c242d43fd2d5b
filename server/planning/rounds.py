"""The time of one round: drafting a tree for every row, verifying it, drawing tokens.

A round is predicted as the sum over its parts, each on one GPU (all do the same): the products of
server/planning/products.py, attention, the small kernels between them, and sums over GPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from engine.parallel.shard import Shard
from engine.step.shape import DynamicShape, TreeShape
from server.planning.costs import ACTIVATION, LOGIT, Cost, Machine
from server.planning.products import (
    HeadSizes,
    head_fc,
    head_layer_products,
    head_lm_head,
    layer_products,
    vocabulary,
)
from server.planning.sizes import ModelSizes

# Kernels of a decoder layer beside products and attention: two norms, rotation with the write to
# the cache, and the activation.
LAYER_KERNELS = 4
QK_NORM_KERNELS = 2
Parts = Mapping[str, Cost]


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model, perhaps with a draft head, on a machine."""

    machine: Machine
    target: ModelSizes
    head: HeadSizes | None = None
    cache_bytes: int = ACTIVATION  # of a number of the target's keys and values
    run_ahead: bool = True  # the host works while the GPU does


def round_parts(deployment: Deployment, rows: int, context: int, shape: TreeShape) -> Parts:
    """The parts of a round of `rows` sequences of `context` tokens each, by name; microseconds."""
    machine = deployment.machine
    found: dict[str, Cost] = {}
    pieces = [*_forward(deployment, rows, context, shape.num_nodes)]
    pieces += [*_drawing(deployment, rows * shape.num_nodes)]
    if shape.num_nodes > 1:
        pieces += [*_drafting(deployment, rows, context, shape)]
    if not deployment.run_ahead:
        pieces.append(("host", machine.host(rows, shape.num_nodes)))
    for name, cost in pieces:
        found[name] = found.get(name, Cost()) + cost
    return found


def round_cost(deployment: Deployment, rows: int, context: int, shape: TreeShape) -> Cost:
    """The sum of `round_parts`."""
    return summed(round_parts(deployment, rows, context, shape))


def summed(parts: Parts) -> Cost:
    return sum(parts.values(), Cost())


def prefill_cost(deployment: Deployment, num_tokens: int, chunk: int) -> Cost:
    """Of a prompt of `num_tokens`, `chunk` tokens in a step, alone on the machine."""
    whole = Cost()
    for first in range(0, num_tokens, chunk):
        last = min(first + chunk, num_tokens)
        whole += _prompt_step(deployment, first, last - first)
    return whole


def _prompt_step(deployment: Deployment, first: int, new: int) -> Cost:
    machine, sizes = deployment.machine, deployment.target
    pieces = [cost for _, cost in _layers(deployment, new)]
    half = machine.calibration.attention_half_tokens
    flops = _attention_flops(deployment, new, first + new / 2) * (1 + half / new)
    cache = _cache_bytes(deployment, 1, first + new)
    pieces.append(machine.attention(sizes.num_layers, 1, cache, flops))
    pieces += [cost for _, cost in _drawing(deployment, 1)]
    pieces.append(machine.host(1, 1))  # steps with prompts do not run ahead
    return sum(pieces, Cost())


def _forward(
    deployment: Deployment, rows: int, context: int, num_nodes: int
) -> Iterator[tuple[str, Cost]]:
    sizes, machine, num_tokens = deployment.target, deployment.machine, rows * num_nodes
    yield from _layers(deployment, num_tokens)
    cache = _cache_bytes(deployment, rows, context)
    flops = _attention_flops(deployment, num_tokens, context)
    spent = machine.attention(sizes.num_layers, rows, cache, flops, num_nodes)
    yield "attention, cache", spent


def _layers(deployment: Deployment, num_tokens: int) -> Iterator[tuple[str, Cost]]:
    """Products, small kernels and sums over GPUs of the target's layers."""
    machine, sizes = deployment.machine, deployment.target
    for product in layer_products(sizes, machine.ranks):
        yield f"{product.part}, products", machine.product(product, num_tokens)
    yield "norms and activations", _between_products(machine, sizes, num_tokens)
    sums = 1 + 2 * sizes.num_layers  # the embedding's, and two of every layer
    summed_bytes = num_tokens * sizes.hidden_size * ACTIVATION
    yield "sums over GPUs", machine.all_reduce(sums, summed_bytes)


def _between_products(machine: Machine, sizes: ModelSizes, num_tokens: float) -> Cost:
    found = machine.calibration
    number = sizes.num_layers * (LAYER_KERNELS + found.split_reductions)
    number += sizes.num_layers * QK_NORM_KERNELS * sizes.qk_norm
    values = sizes.num_layers * (8 * sizes.hidden_size)  # both norms read and write two streams
    values += sizes.num_dense_layers * 3 * sizes.dense_width // machine.ranks
    if sizes.experts is not None:
        experts = sizes.experts
        number += experts.num_layers * (found.moe_kernels + 1)
        used = (1 + experts.per_token) * experts.width
        values += experts.num_layers * 3 * used // machine.ranks
    return machine.kernels(number) + machine.stream(num_tokens * values * ACTIVATION)


def _attended(sizes: ModelSizes, context: float) -> float:
    """Entries that a token attends to, summed over layers. In layers with local attention these are
    the ones since the last border of a chunk: half a chunk on average, once there are borders."""
    local = context if context <= sizes.local_chunk else sizes.local_chunk / 2
    whole = sizes.num_layers - sizes.local_layers
    return whole * context + sizes.local_layers * local


def _cache_bytes(deployment: Deployment, rows: int, context: float) -> float:
    """Keys and values of the target that one GPU reads."""
    sizes = deployment.target
    heads = Shard(0, deployment.machine.ranks).num_kv_heads(sizes.num_kv_heads)
    entry = 2 * heads * sizes.head_dim * deployment.cache_bytes
    return rows * entry * _attended(sizes, context)


def _attention_flops(deployment: Deployment, num_tokens: int, context: float) -> float:
    """Of one GPU's query heads: two products for every token and entry."""
    sizes = deployment.target
    width = sizes.num_heads // deployment.machine.ranks * sizes.head_dim
    return 4 * num_tokens * width * _attended(sizes, context)


def _drawing(deployment: Deployment, num_nodes: int) -> Iterator[tuple[str, Cost]]:
    """Logits of all nodes, and the tokens drawn from them, spread over the GPUs."""
    machine, sizes = deployment.machine, deployment.target
    found = machine.calibration
    rows = vocabulary(sizes, machine.ranks)
    logits = num_nodes * rows.outputs * LOGIT
    yield "LM head", machine.product(rows, num_nodes)
    reads = machine.stream(logits * found.logit_reads)
    yield "drawing tokens", reads + machine.kernels(found.round_kernels)
    yield "sums over GPUs", machine.all_reduce(1, logits) + machine.all_reduce(1, 0)


def _drafting(
    deployment: Deployment, rows: int, context: int, shape: TreeShape
) -> Iterator[tuple[str, Cost]]:
    head = deployment.head
    if head is None:
        return
    widths, found = frontiers(shape), deployment.machine.calibration
    yield "ranking drafts", deployment.machine.kernels(found.draft_kernels)
    for level, width in enumerate(widths):
        # The first pass takes the tokens of the last round, of which the host does not know how
        # many there are: it has room for all that its tree could have accepted.
        tokens = rows * (len(widths) + 1 if level == 0 else width)
        yield from _level(deployment, head, tokens, rows * width, (rows, context))
        if level == 0 and (fc := head_fc(head, deployment.machine.ranks)) is not None:
            yield fc.part, deployment.machine.product(fc, tokens)


def _level(
    deployment: Deployment,
    head: HeadSizes,
    num_tokens: int,
    parents: int,
    attended: tuple[int, int],
) -> Iterator[tuple[str, Cost]]:
    """One pass of the head: `num_tokens` go in, `parents` of them get children. `attended`: the
    number of rows, and of entries that each of them attends to."""
    rows, context = attended
    machine, layers = deployment.machine, head.layers
    ranks = 1 if head.replicated else machine.ranks
    part = "draft layers"
    for product in head_layer_products(head, machine.ranks):
        yield part, machine.product(product, num_tokens)
    yield part, _between_products(replace(machine, ranks=ranks), layers, num_tokens)
    heads = Shard(0, ranks).num_kv_heads(layers.num_kv_heads)
    cache = 2 * heads * layers.head_dim * ACTIVATION * layers.num_layers * rows * context
    yield part, machine.attention(layers.num_layers, rows, cache, 0.0)
    lm_head = head_lm_head(head, machine.ranks)
    logits = parents * head.draft_vocab_size * LOGIT  # every GPU ranks all of them
    yield lm_head.part, machine.product(lm_head, parents)
    reads = machine.stream(logits * machine.calibration.draft_logit_reads)
    yield "ranking drafts", reads + machine.kernels(machine.calibration.level_kernels)
    streams = num_tokens * layers.hidden_size * ACTIVATION
    sums = machine.all_reduce(1 + (0 if head.replicated else 2 * layers.num_layers), streams)
    yield "draft sums over GPUs", sums + machine.all_reduce(1, logits / 2)


def frontiers(shape: TreeShape) -> list[int]:
    """How many nodes of a row get children, level by level: one pass of the head each."""
    if isinstance(shape, DynamicShape):
        return [1, *[shape.top_k] * (shape.max_depth - 1)]
    depths, parents = shape.depths, set(shape.parents)
    by_depth = Counter(depths[node] for node in range(shape.num_nodes) if node in parents)
    return [by_depth[depth] for depth in sorted(by_depth)]
