"""A draft head over ranks, cut or replicated, gives the same results as on one rank."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drafter.checkpoint import load_head
from drafter.heads import building
from drafter.heads.building import HeadBuilder, LoadedHead
from engine.checkpoints.arch import LlamaArch
from engine.models.place import Place
from engine.parallel.shard import WHOLE, Shard
from engine.step.group import TPGroup
from kernels.ops import LinearWeight, Ops
from tests.drafter.parallel_heads import PARALLEL_LAYOUTS
from tests.drafter.published_heads import CPU, HIDDEN, LAYOUTS, TARGET, VOCAB, TargetWeights
from tests.drafter.test_head_forward import MAX_LEN, PagedHead, run_chunks
from tests.drafter.test_parallel_heads import drafted, take_chunks
from tests.support.heads.tiny_heads import write_tiny_head
from tests.support.models.tiny_llama import TinyLlama
from tests.support.ranks.thread_group import ThreadGroup, run_ranks

TOLERANCE = 2e-3  # float32 sums in another order, fed back three times; a wrong part is off by 0.1
PRIME = TinyLlama(
    vocab_size=VOCAB, hidden_size=HIDDEN, num_heads=12, head_dim=16, intermediate_size=144
)
Ran = list[tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Loading:
    """How a rank loads the head at `path`."""

    path: Path
    target: LlamaArch
    weights: TargetWeights
    replicated: bool

    def load(self, shard: Shard) -> LoadedHead:
        embedding = self._part(self.weights.embedding, shard)
        lm_head = self._part(self.weights.lm_head, shard)
        shared = building.TargetWeights(self.target, embedding, lm_head)
        place = Place(self.weights.ops, torch.float32, CPU, shard)
        return load_head(self.path, HeadBuilder(shared, place, MAX_LEN, self.replicated))

    def _part(self, table: Tensor, shard: Shard) -> LinearWeight:
        width = shard.padded_width(VOCAB)
        filled = F.pad(table, (0, 0, 0, width * shard.size - VOCAB))
        return self.weights.ops.pack_linear(filled.split(width)[shard.rank], None)

    def draft(self, group: TPGroup) -> Tensor:
        """States of tokens that are drafted all at once."""
        paged = PagedHead(self.load(Shard(group.rank, group.size)), self.weights.ops, group)
        with torch.inference_mode():
            take_chunks(paged)
            return drafted(paged)

    def run(self, group: TPGroup) -> Ran:
        """States and logits of every chunk, by row."""
        head = self.load(Shard(group.rank, group.size))
        paged = PagedHead(head, self.weights.ops, group)
        with torch.inference_mode():
            run_chunks(paged, torch.Generator().manual_seed(6))
            rows = [torch.cat(row.states) for row in paged.rows]
            return [(states, paged.head.logits(states, paged.ctx)) for states in rows]


def assert_equal_to_one_rank(loading: Loading, size: int) -> None:
    expected = loading.run(TPGroup())
    for found in run_ranks(size, loading.run):
        for (states, logits), (wanted, scores) in zip(found, expected, strict=True):
            torch.testing.assert_close(states, wanted, atol=TOLERANCE, rtol=TOLERANCE)
            torch.testing.assert_close(logits, scores, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("size", "replicated"), [(2, False), (2, True), (3, True)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_over_ranks_equals_one_rank(
    name: str, size: int, replicated: bool, reference_ops: Ops, tmp_path: Path
) -> None:
    path, weights = LAYOUTS[name].write(tmp_path), TargetWeights.of(reference_ops)
    assert_equal_to_one_rank(Loading(path, TARGET, weights, replicated), size)


@pytest.mark.parametrize(("size", "num_kv_heads"), [(3, 3), (3, 1), (4, 2)])
def test_heads_of_shared_and_single_kv_heads_equal_one_rank(
    size: int, num_kv_heads: int, reference_ops: Ops, tmp_path: Path
) -> None:
    spec = dataclasses.replace(PRIME, num_kv_heads=num_kv_heads)
    path = write_tiny_head(tmp_path / "head", spec, draft_vocab=37, num_layers=2)
    target = LlamaArch.from_hf_config(spec.config().to_dict())
    weights = TargetWeights.of(reference_ops)
    assert_equal_to_one_rank(Loading(path, target, weights, replicated=False), size)


def test_only_what_is_cut_is_smaller_on_a_rank(reference_ops: Ops, tmp_path: Path) -> None:
    path, weights = LAYOUTS["reference-eagle3"].write(tmp_path), TargetWeights.of(reference_ops)

    def sizes(shard: Shard, replicated: bool) -> tuple[int, ...]:
        head = Loading(path, TARGET, weights, replicated).load(shard)
        qkv = head.layers[0].attention.qkv.weight
        fc = head.fusion.fc.weight
        return (qkv.out_features, fc.out_features, head.lm_head.weight.out_features)

    assert sizes(WHOLE, replicated=False) == (200, 72, 37)
    assert sizes(Shard(1, 2), replicated=False) == (100, 36, 19)
    assert sizes(Shard(1, 2), replicated=True) == (200, 72, 19)


@pytest.mark.parametrize(
    ("replicated", "expected"),
    [
        (False, [1, 3, 1]),  # fc; embedding, attention, feed-forward; LM head
        (True, [0, 1, 1]),  # embedding; LM head
    ],
)
def test_a_replicated_head_waits_for_others_at_the_vocabulary_only(
    replicated: bool, expected: list[int], reference_ops: Ops, tmp_path: Path
) -> None:
    path, weights = LAYOUTS["reference-eagle3"].write(tmp_path), TargetWeights.of(reference_ops)
    loading = Loading(path, TARGET, weights, replicated)

    def count(group: ThreadGroup) -> list[int]:
        paged = PagedHead(loading.load(Shard(group.rank, 2)), reference_ops, group)
        with torch.inference_mode():
            counts = [group.num_collectives]
            features = paged.head.fuse((torch.zeros(2, HIDDEN),) * 3, paged.ctx)
            counts.append(group.num_collectives)
            states = paged.forward(features, [torch.tensor([3]), torch.tensor([5])])
            counts.append(group.num_collectives)
            paged.head.logits(states, paged.ctx)
            counts.append(group.num_collectives)
        return [after - before for before, after in pairwise(counts)]

    assert run_ranks(2, count) == [expected, expected]


def test_a_repeated_vocabulary_is_shared_on_every_rank(reference_ops: Ops, tmp_path: Path) -> None:
    weights = TargetWeights.of(reference_ops)

    def repeat(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = weights.embedding.clone()

    path = LAYOUTS["vllm-eagle"].write(tmp_path, repeat)
    for rank in range(2):
        loading = Loading(path, TARGET, weights, replicated=False)
        embedding = loading._part(weights.embedding, Shard(rank, 2))
        lm_head = loading._part(weights.lm_head, Shard(rank, 2))
        shared = building.TargetWeights(TARGET, embedding, lm_head)
        place = Place(reference_ops, torch.float32, CPU, Shard(rank, 2))
        head = load_head(path, HeadBuilder(shared, place, MAX_LEN))
        assert head.embedding.weight is embedding
        assert head.lm_head.weight is not lm_head


def test_a_head_that_cannot_be_cut_says_why(reference_ops: Ops, tmp_path: Path) -> None:
    path, weights = LAYOUTS["reference-eagle3"].write(tmp_path), TargetWeights.of(reference_ops)
    message = r"draft_parallel = sharded, parallel.tensor = 3: 2 KV heads .* allows 1, 2$"
    with pytest.raises(ValueError, match=message):
        Loading(path, TARGET, weights, replicated=False).load(Shard(0, 3))


@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("name", ["speculators-peagle", "z-lab-dflash"])
def test_heads_that_draft_in_parallel_do_so_over_ranks(
    name: str, replicated: bool, reference_ops: Ops, tmp_path: Path
) -> None:
    path, weights = PARALLEL_LAYOUTS[name].write(tmp_path), TargetWeights.of(reference_ops)
    loading = Loading(path, TARGET, weights, replicated)
    expected = loading.draft(TPGroup())
    for found in run_ranks(2, loading.draft):
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
