"""Heads that draft all tokens at once: their files, their formulas, and their trees."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drafter.checkpoint import load_head, read_head_config
from drafter.growing import Grower
from drafter.heads.config import HeadConfig
from drafter.heads.interface import ParallelHead
from drafter.marginals import (
    MOST_PATHS,
    Marginals,
    PathTables,
    grow_at_once,
    likeliest_paths,
)
from drafter.static_levels import StaticLevels
from engine.kv.scratch import Scratch
from engine.speculation.proposer import DraftLimits, Roots
from engine.step.shape import DynamicShape, StaticShape, TreeShape, chain
from kernels.ops import Ops
from tests.drafter.parallel_heads import (
    DFLASH,
    MASK,
    PARALLEL_LAYOUTS,
    Z_LAB,
    DFlashLayout,
    formulas_of,
)
from tests.drafter.published_heads import (
    CPU,
    HIDDEN,
    LAYOUTS,
    TARGET,
    VOCAB,
    TargetWeights,
    named,
    speculators,
)
from tests.drafter.test_growing import grower_of
from tests.drafter.test_head_forward import (
    BLOCK,
    CHUNKS,
    MAX_LEN,
    NUM_BLOCKS,
    TABLES,
    TOLERANCE,
    PagedHead,
    load,
)

DEPTH = 5


def roots_after(positions: list[int], tokens: list[Tensor]) -> Roots:
    count = len(positions)
    return Roots(
        lines=torch.arange(count),
        tokens=torch.stack([ids[-1] for ids in tokens]),
        positions=torch.tensor(positions),
        max_nodes=torch.full((count,), DEPTH + 1),
        block_tables=TABLES,
        temperatures=torch.zeros(count),
        seeds=torch.zeros(count, dtype=torch.int64),
        top_k=torch.full((count,), VOCAB),
        top_p=torch.ones(count),
        min_p=torch.zeros(count),
    )


@pytest.fixture(params=["reference", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    found: Ops = request.getfixturevalue(f"{request.param}_ops")
    return found


def take_chunks(paged: PagedHead) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Give a head committed tokens of random features; returns these, and what it fuses them to."""
    generator = torch.Generator().manual_seed(6)
    found = []
    for lens in CHUNKS:
        ids = [torch.randint(VOCAB, (n,), generator=generator) for n in lens]
        taps = tuple(
            torch.randn(sum(lens), HIDDEN, generator=generator) for _ in paged.head.tap_layers
        )
        found.append((taps, paged.head.fuse(taps, paged.ctx)))
        paged.forward(found[-1][1], ids)
    return found


def drafted(paged: PagedHead, num_slots: int = DEPTH + 1) -> Tensor:
    """The states [B, DEPTH, H] for the tokens after the committed ones."""
    assert isinstance(paged.head, ParallelHead)
    tokens = [torch.cat(row.ids) for row in paged.rows]
    grower = Grower(
        paged.head,
        paged.ctx,
        roots_after([len(ids) for ids in tokens], tokens),
        torch.full((len(tokens),), num_slots),
        torch.ones(len(tokens), dtype=torch.int32),
        torch.full((len(tokens),), num_slots),
        DraftLimits(False, False, False, MAX_LEN, MAX_LEN),
        Scratch(NUM_BLOCKS - 1, BLOCK),
        StaticLevels(CPU),
    )
    roots = torch.stack([row.states[-1][-1] for row in paged.rows])
    return grower.all_at_once(paged.head, roots, DEPTH)


@pytest.mark.parametrize("num_slots", [DEPTH + 1, 3], ids=["all slots", "few slots"])
@pytest.mark.parametrize("name", PARALLEL_LAYOUTS)
@torch.inference_mode()
def test_drafts_over_pages_equal_the_formulas_over_the_whole(
    name: str, num_slots: int, ops: Ops, tmp_path: Path
) -> None:
    """Guesses without a slot are neither seen nor right; the others are as if they were not
    there."""
    layout, target = PARALLEL_LAYOUTS[name], TargetWeights.of(ops)
    formulas = formulas_of(layout, target)
    paged = PagedHead(load(layout, tmp_path, target), ops)
    for taps, fused in take_chunks(paged):
        expected = formulas.fuse(taps)
        torch.testing.assert_close(fused.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    states = drafted(paged, num_slots)
    tokens = [torch.cat(row.ids) for row in paged.rows]
    lookahead = 0 if isinstance(layout, DFlashLayout) else 1
    known = DEPTH if num_slots > DEPTH else num_slots + lookahead - 1
    for row, ids, got in zip(paged.rows, tokens, states, strict=True):
        expected = formulas.draft(torch.cat(row.features), ids, known)
        torch.testing.assert_close(got[:known].double(), expected, atol=1e-3, rtol=1e-3)
        logits = paged.head.logits(got[:known].contiguous(), paged.ctx).double()
        torch.testing.assert_close(logits, formulas.logits(expected), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", PARALLEL_LAYOUTS)
def test_layouts_are_read(name: str, tmp_path: Path) -> None:
    config = read_head_config(PARALLEL_LAYOUTS[name].write(tmp_path), TARGET)
    assert (config.kind, config.mask_token_id) == (name.split("-")[-1], MASK)
    assert config.tap_layers(TARGET) == PARALLEL_LAYOUTS[name].taps
    assert config.max_depth == (7 if config.kind == "dflash" else 61)


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("vllm-peagle", drop("mask_hidden"), "missing tensor mask_hidden, of shape .1, 1, 216"),
        ("vllm-peagle", put("mask_hidden", 1, 1, 72), "mask_hidden has shape .1, 1, 72., "),
        ("vllm-peagle", put("hidden_norm.weight", 72), "hidden_norm.weight is unexpected"),
        ("z-lab-dflash", drop("hidden_norm.weight"), "missing tensor hidden_norm.weight"),
        (
            "z-lab-dflash",
            drop("layers.1.self_attn.k_norm.weight"),
            "missing tensor layers.1.self_attn.k_norm.weight, of shape .20",
        ),
        ("z-lab-dflash", put("fc.weight", 72, 72), "fc.weight has shape .72, 72"),
        ("z-lab-dflash", put("fc.bias", 72), "tensor fc.bias is unexpected"),
        ("z-lab-dflash", put("markov_head.weight", 2, 2), "markov_head.weight is unexpected"),
        ("speculators-dflash", drop("d2t"), "missing tensor d2t"),
    ],
)
def test_wrong_tensors_are_named(
    layout: str, change: Callable[..., object], message: str, reference_ops: Ops, tmp_path: Path
) -> None:
    folder = PARALLEL_LAYOUTS[layout].write(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_head(folder, TargetWeights.of(reference_ops).builder())


EAGLE3 = named("LlamaForCausalLMEagle3")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (speculators("peagle"), "a P-EAGLE head needs mask_token_id"),
        (EAGLE3 | {"parallel_drafting": True}, "a P-EAGLE head needs mask_token_id"),
        (EAGLE3 | {"ptd_token_id": VOCAB}, "mask_token_id 131 must be 0 to 130"),
        (EAGLE3 | {"ptd_token_id": 3, "mask_token_id": 4}, "must be the same token"),
        (EAGLE3 | {"ptd_token_id": "3"}, "ptd_token_id must be int, not '3'"),
        (EAGLE3 | {"dflash_config": DFLASH}, "dflash_config belongs to DFlashDraftModel"),
        (Z_LAB | {"dflash_config": DFLASH}, "a DFlash head needs block_size"),
        (Z_LAB | {"block_size": 1, "dflash_config": DFLASH}, "block_size 1 must be at least 2"),
        (Z_LAB | {"block_size": 8}, "needs either dflash_config.target_layer_ids or"),
        (
            Z_LAB | {"block_size": 8, "dflash_config": DFLASH | {"causal": True}},
            "causal true is not supported",
        ),
        (
            Z_LAB | {"block_size": 8, "dflash_config": DFLASH | {"output_multiplier": 0.2}},
            "dflash_config has .'output_multiplier'.; mask_token_id, ",
        ),
        (
            Z_LAB
            | {"block_size": 8, "dflash_config": DFLASH, "layer_types": ["sliding_attention"] * 2},
            "layer_types .'sliding_attention'. are not supported",
        ),
        (named("DFlash2DraftModel", dflash_config=DFLASH), "DFlash 2 heads are not supported"),
        (speculators("dflash", sample_from_anchor=True), "sample_from_anchor true is not"),
        (speculators("dspark"), "DSpark heads are not supported; EAGLE, EAGLE-3, P-EAGLE and"),
        (Z_LAB | {"dflash_config": {"projector_type": "domino"}}, "Domino or DSpark heads"),
    ],
)
def test_unusable_configuration_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig.from_json(config)


def test_the_last_layers_output_is_refused_where_layouts_disagree() -> None:
    ids = {**DFLASH, "target_layer_ids": [1, TARGET.num_layers - 1]}
    config = HeadConfig.from_json(Z_LAB | {"block_size": 8, "dflash_config": ids})
    with pytest.raises(ValueError, match="before or after the final norm"):
        config.tap_layers(TARGET)


def test_an_eagle3_head_stays_one_and_drafts_to_any_depth() -> None:
    assert HeadConfig.from_json(LAYOUTS["reference-eagle3"].config).max_depth is None
    assert HeadConfig.from_json(EAGLE3 | {"parallel_drafting": False}).kind == "eagle3"


class FixedHead:
    """Ranks tokens by one table, whatever the states; implements `ParallelHead` as far as trees
    need it."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores  # [D, V]
        self.target_ids = None
        self.arch = self.shard = self.tap_layers = self.mask_token = None

    def block(self, root_tokens: Tensor, depth: int) -> None:
        """No entries."""

    def draft(self, root_states: Tensor, batch: object, depth: int, ctx: object) -> Tensor:
        return self.scores[:depth].expand(len(root_states), -1, -1)

    def logits(self, states: Tensor, ctx: object) -> Tensor:
        return states

    fuse = forward = draft


def grown(shape: TreeShape, scores: Tensor, ops: Ops, temperature: float = 0.0) -> Any:
    grower, _ = grower_of(ops, [6, 9], [99, 99], temperature=temperature)
    head: Any = FixedHead(scores)
    grower = dataclasses.replace(grower, head=head)
    marginals = Marginals(grower, head, torch.zeros(2, 1))
    return grow_at_once(shape, marginals, PathTables(CPU))


def test_a_fixed_shape_takes_the_best_tokens_of_each_depth(reference_ops: Ops) -> None:
    scores = torch.randn(3, 23, generator=torch.Generator().manual_seed(1))
    best = scores.argsort(dim=1, descending=True)
    shape = StaticShape("tree", (-1, 0, 0, 1, 1, 2, 3))
    tree = grown(shape, scores, reference_ops)
    first, second, third = best.tolist()
    wanted = [first[0], first[1], second[0], second[1], second[0], third[0]]
    assert tree.tokens[:, 1:].tolist() == [wanted, wanted]
    assert tree.parents[0].tolist() == list(shape.parents)
    line = grown(chain(3), scores, reference_ops)
    assert line.tokens[0, 1:].tolist() == [first[0], second[0], third[0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_candidates_are_ranked_with_the_noise_of_their_own_position(
    temperature: float, reference_ops: Ops
) -> None:
    """Both rows have one table; at temperature 1 their seeds and positions tell them apart."""
    scores = torch.zeros(4, 23)
    scores[:, :2] = 1e-3
    tokens = grown(chain(4), scores, reference_ops, temperature).tokens[:, 1:]
    assert len(set(map(tuple, tokens.tolist()))) == (1 if temperature == 0 else 2)
    assert len(set(tokens.flatten().tolist())) > (0 if temperature == 0 else 3)


@pytest.mark.parametrize("num_nodes", [2, 7, 12])
def test_a_dynamic_tree_holds_the_likeliest_products(num_nodes: int, reference_ops: Ops) -> None:
    """Against a search of all paths."""
    depth, width = 3, 4
    scores = 2 * torch.randn(depth, 23, generator=torch.Generator().manual_seed(num_nodes))
    tree = grown(DynamicShape("d", num_nodes, depth, width), scores, reference_ops)
    log_q = scores.log_softmax(dim=1)
    top = log_q.topk(width).indices.tolist()
    every = [path for n in (1, 2, 3) for path in itertools.product(*top[:n])]
    score = {path: sum(float(log_q[d, t]) for d, t in enumerate(path)) for path in every}
    likeliest = sorted(every, key=lambda path: -score[path])[: num_nodes - 1]
    paths: list[tuple[int, ...]] = []
    for node, parent in enumerate(tree.parents[0].tolist()):
        above = () if node == 0 or parent == 0 else paths[parent]
        paths.append(() if node == 0 else (*above, int(tree.tokens[0, node])))
    assert set(paths[1:]) == set(likeliest)
    assert tree.depths[0].tolist() == [len(path) for path in paths]


def test_the_paths_of_a_large_tree_are_bounded() -> None:
    few = likeliest_paths(16, 5, 6)
    assert all(path[:-1] in few or len(path) == 1 for path in few)
    assert few == sorted(few, key=lambda path: (len(path), path))
    assert 59 < len(likeliest_paths(60, 7, 10)) <= MOST_PATHS


def test_an_unsound_distribution_leaves_a_tree(reference_ops: Ops) -> None:
    scores = torch.full((3, 23), torch.nan)
    tree = grown(DynamicShape("d", 5, 3, 2), scores, reference_ops)
    assert tree.parents[0, 0] == -1
    assert bool((tree.parents[0, 1:] < torch.arange(1, 5)).all())
