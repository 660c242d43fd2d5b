"""Every element of a model is loaded exactly where it belongs, for any number of ranks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import ExpertCut
from engine.checkpoints.arch import LlamaArch, Shape
from engine.checkpoints.families import read_text_model
from engine.checkpoints.llama4_arch import Llama4Arch
from engine.checkpoints.manifest import expected_tensors
from engine.checkpoints.stored import Index
from engine.models.families import load_target
from engine.models.llama import Llama, LlamaLoader
from engine.models.place import Place
from engine.parallel.shard import Shard, allowed_degrees, check_degree, kv_copies
from kernels.ops import LinearWeight, Ops
from tests.support.files.published_llamas import LLAMA4_MAVERICK, LLAMA31_8B, LLAMA33_70B, PUBLISHED

META, CPU = torch.device("meta"), torch.device("cpu")
DEGREES = (1, 2, 4, 8)
NARROW = 16  # hidden size of models of which every element is checked


class Taken:
    """A stored tensor without contents that records which rectangles were read."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.rectangles: list[tuple[range, ...]] = []

    def __getitem__(self, index: Index) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        sides = [range(size) for size in self.shape]
        for side, part in enumerate(index):
            sides[side] = sides[side][part]
        self.rectangles.append(tuple(sides))
        shape = [len(side) for side in sides]
        return torch.empty(shape, dtype=torch.bfloat16, device=META)

    def copies(self) -> set[int]:
        """How often elements were read: a single number if all were read equally often."""
        cut = [side for side in range(len(self.shape)) if self._is_cut(side)]
        assert len(cut) <= 1, "cut along two sides"
        side = cut[0] if cut else 0
        return set(Counter(at for each in self.rectangles for at in each[side]).values()) | (
            set() if self._covers(side) else {0}
        )

    def _is_cut(self, side: int) -> bool:
        return any(len(each[side]) < self.shape[side] for each in self.rectangles)

    def _covers(self, side: int) -> bool:
        return len({at for each in self.rectangles for at in each[side]}) == self.shape[side]


def load(arch: LlamaArch, read: Any, ops: Ops, shard: Shard, device: torch.device) -> Llama:
    return LlamaLoader(arch, read, Place(ops, torch.float32, device, shard), 32).load()


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("size", [*DEGREES, 16])
def test_every_published_tensor_is_read_once_over_all_ranks(
    name: str, size: int, reference_ops: Ops
) -> None:
    config, num_tensors = PUBLISHED[name]
    arch = LlamaArch.from_hf_config(config)
    stored = {key: Taken(shape) for key, shape in expected_tensors(arch).items()}
    assert len(stored) == num_tensors
    for rank in range(size):
        load(arch, stored.__getitem__, reference_ops, Shard(rank, size), META)
    for key, taken in stored.items():
        copies = size if "norm" in key else 1
        if ".k_proj." in key or ".v_proj." in key:
            copies = kv_copies(arch.num_kv_heads, size)
        assert taken.copies() == {copies}, key


@pytest.mark.parametrize("experts", ["tensor", "expert"])
def test_experts_of_their_own_are_read_once_over_all_ranks(
    experts: ExpertCut, reference_ops: Ops
) -> None:
    arch = few_experts(16, separate_experts=True)
    stored = {key: Taken(shape) for key, shape in expected_tensors(arch).items()}
    for rank in range(8):
        place = Place(reference_ops, torch.bfloat16, META, Shard(rank, 8), experts=experts)
        load_target(arch, stored.__getitem__, place, 32)
    for key, taken in stored.items():
        copies = 8 if "norm" in key or "router" in key else 1
        assert taken.copies() == {copies}, key


def few_experts(count: int, **changes: Any) -> Llama4Arch:
    """Two layers of Maverick, of which one has `count` experts."""
    arch = read_text_model(LLAMA4_MAVERICK).arch
    assert isinstance(arch, Llama4Arch)
    changes |= {"num_layers": 2, "num_experts": count, "moe_layers": frozenset({1})}
    return dataclasses.replace(arch, **changes)


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        (few_experts(12), "expert: 12 experts do not divide by 8 ranks; tensor is possible"),
        (LlamaArch.from_hf_config(LLAMA31_8B), "expert: this model has no experts"),
    ],
    ids=["12 experts", "none"],
)
def test_whole_experts_that_cannot_be_spread_are_refused(
    arch: LlamaArch, reason: str, reference_ops: Ops
) -> None:
    place = Place(reference_ops, torch.bfloat16, META, Shard(0, 8), experts="expert")
    with pytest.raises(ValueError, match=f"parallel.experts = {reason}"):
        load_target(arch, {}.__getitem__, place, 32)


def narrow(config: dict[str, Any]) -> LlamaArch:
    """One layer of a published model; sizes that are not cut are small."""
    arch = LlamaArch.from_hf_config(config)
    return dataclasses.replace(arch, hidden_size=NARROW, num_layers=1)


def numbered(arch: LlamaArch) -> dict[str, Tensor]:
    """Every element of every tensor is a different integer, exact in float32."""
    tensors, first = {}, 0
    for key, shape in expected_tensors(arch).items():
        size = torch.Size(shape).numel()
        tensors[key] = torch.arange(first, first + size, dtype=torch.float32).view(shape)
        first += size
    assert first < 2**24
    return tensors


@pytest.mark.parametrize("config", [LLAMA31_8B, LLAMA33_70B], ids=["8B", "70B"])
@pytest.mark.parametrize("size", [*DEGREES, 16])
def test_parts_of_all_ranks_in_order_are_the_tensors(
    config: dict[str, Any], size: int, reference_ops: Ops
) -> None:
    arch = narrow(config)
    tensors = numbered(arch)
    ranks = [
        load(arch, tensors.__getitem__, reference_ops, Shard(rank, size), CPU)
        for rank in range(size)
    ]
    layer = "model.layers.0"

    def joined(weights: list[LinearWeight], dim: int = 0) -> Tensor:
        return torch.cat([weight.data for weight in weights], dim)

    def equals(found: Tensor, name: str) -> None:
        assert torch.equal(found, tensors[f"{name}.weight"]), name

    equals(joined([rank.embedding.weight for rank in ranks]), "model.embed_tokens")
    equals(joined([rank.head.weight for rank in ranks]), "lm_head")
    outputs = [rank.layers[0].attention.output.weight for rank in ranks]
    equals(joined(outputs, 1), f"{layer}.self_attn.o_proj")
    downs = [rank.layers[0].mlp.down.weight for rank in ranks]
    equals(joined(downs, 1), f"{layer}.mlp.down_proj")
    halves = [rank.layers[0].mlp.gate_up.weight.data.chunk(2) for rank in ranks]
    equals(torch.cat([gate for gate, _ in halves]), f"{layer}.mlp.gate_proj")
    equals(torch.cat([up for _, up in halves]), f"{layer}.mlp.up_proj")


@pytest.mark.parametrize("config", [LLAMA31_8B, LLAMA33_70B], ids=["8B", "70B"])
@pytest.mark.parametrize("size", [*DEGREES, 16, 32])
def test_query_heads_find_their_kv_head_on_their_rank(
    config: dict[str, Any], size: int, reference_ops: Ops
) -> None:
    arch = narrow(config)
    tensors = numbered(arch)
    group = arch.num_heads // arch.num_kv_heads
    heads = {
        part: tensors[f"model.layers.0.self_attn.{part}_proj.weight"].unflatten(
            0, (-1, arch.head_dim)
        )
        for part in "qkv"
    }
    for rank in range(size):
        shard = Shard(rank, size)
        model = load(arch, tensors.__getitem__, reference_ops, shard, CPU)
        qkv = model.layers[0].attention.qkv.weight.data.unflatten(0, (-1, arch.head_dim))
        num_q, num_kv = arch.num_heads // size, shard.num_kv_heads(arch.num_kv_heads)
        queries, keys, values = qkv.split([num_q, num_kv, num_kv])
        for local in range(num_q):
            head, at = rank * num_q + local, local // (num_q // num_kv)
            assert torch.equal(queries[local], heads["q"][head])
            assert torch.equal(keys[at], heads["k"][head // group])
            assert torch.equal(values[at], heads["v"][head // group])


@pytest.mark.parametrize("size", range(1, 9))
def test_padded_parts_cover_any_vocabulary_with_equal_widths(size: int) -> None:
    for total in range(1, 40):
        shards = [Shard(rank, size) for rank in range(size)]
        held = [at for shard in shards for at in range(total)[shard.padded(total)]]
        assert held == list(range(total))
        width = shards[0].padded_width(total)
        assert all(shard.padded(total).start == min(shard.rank * width, total) for shard in shards)
        assert size * width < total + size


def test_degrees_that_do_not_divide_name_the_number_and_what_is_allowed() -> None:
    arch = LlamaArch.from_hf_config(LLAMA33_70B)
    assert allowed_degrees(arch) == [1, 2, 4, 8, 16, 32, 64]
    with pytest.raises(ValueError, match=r"parallel.tensor = 3: 64 attention heads do not divide"):
        check_degree(arch, 3)
    smollm2 = dataclasses.replace(
        arch, num_heads=9, num_kv_heads=3, intermediate_size=1536, vocab_size=49152
    )
    with pytest.raises(ValueError, match=r"= 2: 9 attention heads .* this model allows 1, 3$"):
        check_degree(smollm2, 2)
    six = dataclasses.replace(arch, num_heads=36, num_kv_heads=6)
    with pytest.raises(ValueError, match="= 4: 6 KV heads neither divide by 4 nor divide it"):
        check_degree(six, 4)
    odd = dataclasses.replace(arch, intermediate_size=28674)
    with pytest.raises(ValueError, match="intermediate_size 28674 does not divide by 4"):
        check_degree(odd, 4)


def test_a_loader_refuses_ranks_that_the_model_cannot_be_cut_for(reference_ops: Ops) -> None:
    arch = LlamaArch.from_hf_config(LLAMA31_8B)
    with pytest.raises(ValueError, match=r"parallel.tensor = 3"):
        load(arch, {}.__getitem__, reference_ops, Shard(0, 3), META)
