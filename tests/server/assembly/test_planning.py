"""Memory and time of a configuration are predicted from config.json alone."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from configs.load import load_config, shipped_configs
from configs.planning import shipped_models
from configs.resolve import HostConfig, with_sizes
from configs.schema import WeightForm
from drafter.checkpoint import load_head
from drafter.heads.building import HeadBuilder
from engine.checkpoints.checkpoint import open_checkpoint, read_arch
from engine.checkpoints.manifest import expected_tensors
from engine.checkpoints.quantised.config import read_quantisation
from engine.checkpoints.source import ModelFiles
from engine.models.families import load_target
from engine.models.footprint import GIB, held_bytes
from engine.models.llama import LlamaLoader
from engine.models.place import Place
from engine.parallel.shard import Shard
from engine.step.shape import StaticShape
from kernels.ops import Ops
from kernels.registry import triton_ops
from server.assembly.drafting import Target, allocate, tree_shape
from server.assembly.planning import (
    PlanOptions,
    head_kind,
    plan,
    read_shapes,
    write_json,
    write_svg,
)
from server.assembly.planning import plan_memory as memory_of
from server.planning.memory import MemoryPlan
from server.planning.tables import memory_title
from tests.support.configurations import hosted
from tests.support.files.published_llamas import LLAMA4_SCOUT, LLAMA31_8B, LLAMA33_70B
from tests.support.files.quantised_files import FORMATS, rewrite
from tests.support.heads.tiny_heads import write_tiny_head
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.models.tiny_llama4 import write_tiny_llama4

CPU = torch.device("cpu")
H100 = 80 * 10**9  # less than an H100 of 80 GB has
NUM_PARAMETERS = {"8B": 8_030_261_248, "70B": 70_553_706_496}  # as published
SHIPPED = {"8B": "llama31-8b-1xh100", "70B": "llama33-70b-8xh100"}
TARGETS = {"8B": LLAMA31_8B, "70B": LLAMA33_70B}
KV_BYTES = 2 * 2 * 128  # keys and values of a token, KV head and layer: bfloat16, D 128


def plan_memory(config: HostConfig, gpu_bytes: int) -> MemoryPlan:
    return memory_of(config, read_shapes(config, PlanOptions()), gpu_bytes)


def speculator(target: dict[str, Any]) -> dict[str, Any]:
    """An EAGLE-3 head with the widths of the target, in the layout of speculators."""
    layer = {**target, "num_hidden_layers": 1, "max_position_embeddings": 2048, "head_dim": 128}
    return {
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": 32000,
        "norm_before_residual": True,
        "speculators_model_type": "eagle3",
        "target_hidden_size": None,
        "transformer_layer_config": layer,
    }


def shipped(folder: Path, size: str, *overrides: str) -> HostConfig:
    """The shipped configuration, with a local config.json of the target and of a head."""
    for name, content in (("target", TARGETS[size]), ("head", speculator(TARGETS[size]))):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(content), encoding="utf-8")
    places = [f"model.source={folder / 'target'}", f"speculation.draft={folder / 'head'}"]
    return hosted(load_config(Path(SHIPPED[size]), [*places, *overrides]))


@pytest.mark.parametrize("size", SHIPPED)
def test_shipped_configurations_fit_into_their_gpus(size: str, tmp_path: Path) -> None:
    plan = plan_memory(shipped(tmp_path, size), H100)
    assert plan.total <= H100
    assert plan.num_sequences(8192) >= 32
    arch, ranks = TARGETS[size], plan.num_gpus
    norms = (2 * arch["num_hidden_layers"] + 1) * arch["hidden_size"]
    table = 4 * 131072 * 128  # rotary, float32; so are norms
    cut = 2 * (NUM_PARAMETERS[size] - norms) // ranks
    assert plan.target_weights == cut + 4 * norms + table
    tokens = (plan.num_blocks + 1) * 16  # and the scratch block
    heads = 8 // ranks
    assert plan.target_kv == tokens * heads * arch["num_hidden_layers"] * KV_BYTES
    assert plan.draft_kv == tokens * heads * KV_BYTES


def test_scout_fits_into_eight_gpus(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA4_SCOUT), encoding="utf-8")
    settings = [f"model.source={tmp_path}", "speculation.draft=null"]
    config = hosted(load_config(Path("llama4-scout-8xh100"), settings))
    plan, arch = plan_memory(config, H100), read_arch(str(tmp_path))
    assert plan.total <= H100
    assert plan.num_sequences(8192) >= 32
    sizes = {name: math.prod(shape) for name, shape in expected_tensors(arch).items()}
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    routers = sum(size for name, size in sizes.items() if "router" in name)
    assert sum(sizes.values()) == pytest.approx(107.8e9, rel=1e-3)  # of 109e9, images included
    tables = 4 * (131072 * (128 + 1) + 2 * 128)  # rotary, temperatures; for heads without positions
    cut = 2 * (sum(sizes.values()) - norms - routers) // 8
    assert plan.target_weights == cut + 4 * norms + 2 * routers + tables


@pytest.mark.parametrize("size", SHIPPED)
def test_shipped_configurations_name_static_trees(size: str) -> None:
    names = load_config(Path(SHIPPED[size])).speculation.candidates
    assert all(isinstance(tree_shape(name), StaticShape) for name in names)


def test_a_replicated_head_is_whole_on_every_gpu(tmp_path: Path) -> None:
    config = shipped(tmp_path, "70B")
    speculation = config.speculation.model_copy(update={"draft_parallel": "replicated"})
    cut = plan_memory(config, H100)
    whole = plan_memory(config.model_copy(update={"speculation": speculation}), H100)
    assert whole.target_weights == cut.target_weights
    per_block = cut.draft_kv // (cut.num_blocks + 1)
    assert whole.draft_kv == 8 * per_block * (whole.num_blocks + 1)
    hidden, inner = 8192, 28672
    layer = (8192 + 2 * 1024) * 2 * hidden + 8192 * hidden + 3 * inner * hidden
    assert whole.draft_weights - cut.draft_weights == 2 * (layer + 3 * hidden * hidden) * 7 // 8


def test_kv_heads_on_several_gpus_are_said(tmp_path: Path) -> None:
    plan = plan_memory(shipped(tmp_path, "8B", "parallel.tensor=16"), H100)
    assert memory_title(plan) == "Memory: 16 GPUs of 74.5 GiB, each KV head on 2"
    assert plan.target_kv == (plan.num_blocks + 1) * 16 * 32 * KV_BYTES


def test_what_does_not_fit_or_divide_is_refused_with_its_numbers(tmp_path: Path) -> None:
    config = shipped(tmp_path, "70B", "parallel.tensor=1")
    with pytest.raises(ValueError, match=r"13\d\.\d GiB of weights on each of 1 GPUs.* 74\.5 GiB"):
        plan_memory(config, H100)
    parallel = config.parallel.model_copy(update={"tensor": 3})
    with pytest.raises(ValueError, match=r"parallel.tensor = 3: 64 attention heads"):
        plan_memory(config.model_copy(update={"parallel": parallel}), H100)


def test_more_cache_than_there_is_room_for_is_refused(tmp_path: Path) -> None:
    asked = shipped(tmp_path, "8B", "cache.num_blocks=1000000")
    with pytest.raises(ValueError, match=r"cache.num_blocks = 1000000: its .* GiB do not fit"):
        plan_memory(asked, H100)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_plan_is_what_a_rank_holds(
    size: int, tied: bool, reference_ops: Ops, tmp_path: Path
) -> None:
    spec = TinyLlama(vocab_size=387, tied=tied, attention_bias=True, mlp_bias=True)
    write_tiny_llama(tmp_path / "target", spec)
    path = write_tiny_head(tmp_path / "head", spec)
    settings = ["model.dtype=float32", f"parallel.tensor={size}", "cache.num_blocks=40"]
    places = [f"model.source={tmp_path / 'target'}", f"speculation.draft={path}"]
    config = hosted(load_config(None, [*settings, *places]))
    plan = plan_memory(config, 4 * GIB)

    checkpoint = open_checkpoint(ModelFiles("hf", tmp_path / "target", "target"))
    arch, shard = checkpoint.arch, Shard(0, size)
    place, max_len = Place(reference_ops, torch.float32, CPU, shard), spec.max_position_embeddings
    model = LlamaLoader(arch, checkpoint.stored, place, max_len).load()
    target = Target(model, arch, frozenset())
    head = load_head(path, HeadBuilder(target.weights, place, max_len))
    resolved = with_sizes(config, max_model_len=max_len, num_blocks=40)
    assert plan.target_weights == held_bytes(model)
    assert plan.draft_weights == held_bytes(model, head) - held_bytes(model)
    assert plan.target_kv == held_bytes(allocate(arch, resolved, place))
    assert plan.draft_kv == held_bytes(allocate(head.arch, resolved, place))


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-blocks", "packed", "packed-zeros"])
def test_the_plan_of_a_quantised_model_is_what_a_gpu_holds(name: str, tmp_path: Path) -> None:
    spec = TinyLlama(hidden_size=256, head_dim=64, num_heads=4, intermediate_size=512)
    rewrite(tmp_path, write_tiny_llama(tmp_path, spec), FORMATS[name])
    settings = ["cache.num_blocks=40", "speculation.draft=null", "parallel.tensor=2"]
    config = hosted(load_config(None, [f"model.source={tmp_path}", *settings]))
    ops = triton_ops(torch.bfloat16)
    checkpoint = open_checkpoint(ModelFiles("hf", tmp_path, "target"))
    place = Place(ops, torch.bfloat16, CPU, Shard(0, 2))
    loader = LlamaLoader(checkpoint.arch, checkpoint.stored, place, spec.max_position_embeddings)
    assert plan_memory(config, 4 * GIB).target_weights == held_bytes(loader.load())


@pytest.mark.parametrize("form", ["plain", "q4"])
def test_the_plan_counts_the_form_that_weights_are_to_take(
    form: WeightForm, tmp_path: Path
) -> None:
    folder = tmp_path / "target"
    widths = {"intermediate_size": 64, "intermediate_size_mlp": 128}
    write_tiny_llama4(folder, **widths)
    settings = ["cache.num_blocks=40", "speculation.draft=null", "parallel.tensor=2"]
    given = [f"model.source={folder}", f"model.weights={form}", *settings]
    checkpoint = open_checkpoint(ModelFiles("hf", folder, "target"))
    ops, max_len = triton_ops(torch.bfloat16), checkpoint.arch.max_position_embeddings
    place = Place(ops, torch.bfloat16, CPU, Shard(0, 2), weights=form)
    model = load_target(checkpoint.arch, checkpoint.stored, place, max_len)
    found = plan_memory(hosted(load_config(None, given)), 4 * GIB)
    assert found.target_weights == held_bytes(model)


def test_eight_bits_are_not_planned(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model.weights = q8 is for CPUs; stored, plain and q4 can"
    ):
        plan_memory(shipped(tmp_path, "8B", "model.weights=q8"), H100)


@pytest.mark.parametrize("name", ["llama33-70b-8xh100-fp8", "llama4-maverick-8xh100-fp8"])
def test_shipped_fp8_configurations_fit_and_are_planned_without_files(name: str) -> None:
    config = hosted(load_config(Path(name)))
    path = shipped_models()[config.model.source]
    assert read_quantisation(json.loads(path.read_text(encoding="utf-8"))) is not None
    found = plan(config, PlanOptions(batches=(1,)))
    billions = 70.6 if "70b" in name else 402
    assert found.memory.target_weights == pytest.approx(billions * 1e9 / 8, rel=0.06)
    assert found.memory.total <= H100
    assert found.memory.num_sequences(8192) >= 32


def test_without_a_head_nothing_is_kept_for_one(tmp_path: Path) -> None:
    config = shipped(tmp_path, "8B")
    speculation = config.speculation.model_copy(update={"draft": None})
    plan = plan_memory(config.model_copy(update={"speculation": speculation}), H100)
    assert (plan.draft_weights, plan.draft_kv) == (0, 0)


def test_entries_add_up() -> None:
    plan = MemoryPlan(2, 10 * GIB, GIB, GIB // 2, 2 * GIB, GIB, GIB, 1, 16, 1024)
    assert sum(plan.entries.values()) == plan.gpu
    assert plan.entries["free"] == 3.5 * GIB
    assert (plan.num_sequences(8192), plan.num_sequences(8193)) == (2, 1)
    assert dataclasses.replace(plan, num_blocks=511).num_sequences(8192) == 0


def test_a_plan_holds_memory_times_and_the_best_tree(tmp_path: Path) -> None:
    config = shipped(tmp_path, "70B")
    found = plan(config, PlanOptions(batches=(1, 64, 256), acceptance=2.94))
    assert found.memory == plan_memory(config, 80 * 10**9)
    assert [batch.batch for batch in found.batches] == [1, 64, 256]
    assert [batch.fits for batch in found.batches] == [True, True, False]
    for batch in found.batches:
        assert batch.speedup >= 1
        assert batch.ms_per_token == pytest.approx(batch.round_ms / batch.tokens_per_round)
        assert sum(batch.shares.values()) == pytest.approx(1)
    write_json(found, tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert written["batches"][1]["batch"] == 64
    assert written["sequences_of_context"] == found.memory.num_sequences(8192)
    write_svg(found, tmp_path / "plan.svg")
    texts = list(ElementTree.parse(tmp_path / "plan.svg").getroot().itertext())
    assert {"plain", "with drafts", "1", "64", "256"} <= set(texts)


@pytest.mark.parametrize("name", [name for name in shipped_configs() if "h100" in name])
def test_shipped_configurations_are_planned_with_their_head_and_without_a_network(
    name: str,
) -> None:
    found = plan(hosted(load_config(Path(name))), PlanOptions(batches=(1,)))
    assert found.memory.draft_weights > 0
    assert found.batches[0].tree != "root"


def test_a_useless_head_is_not_used(tmp_path: Path) -> None:
    found = plan(shipped(tmp_path, "8B"), PlanOptions(batches=(1,), acceptance=1.0))
    (batch,) = found.batches
    assert (batch.tree, batch.speedup, batch.tokens_per_round) == ("root", 1, 1)


def test_known_models_and_assumed_heads_need_no_files() -> None:
    maverick = "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8"
    settings = [f"model.source={maverick}", "parallel.tensor=8", "cache.memory_fraction=0.9"]
    config = hosted(load_config(None, settings))
    found = plan(config, PlanOptions(batches=(1,), head=head_kind("dense3")))
    # 402 billion parameters, nearly all of them in FP8
    assert found.memory.target_weights == pytest.approx(415e9 / 8, rel=0.02)
    assert found.memory.target_kv == (found.memory.num_blocks + 1) * 16 * 48 * KV_BYTES
    assert found.batches[0].tree != "root"


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ([], {"gpu": "a100"}, "no GPU 'a100'; known: b200, h100, h200, or the path of a file"),
        ([], {"weights": "fp5"}, "weights 'fp5': not a known format; known: bf16, fp8, int8, int4"),
        ([], {"context": 200_000}, "--context 200000: the model was made for 131072 tokens"),
        ([], {"acceptance": 5.0}, "acceptance 5: give the mean tokens of a round"),
        (["parallel.tensor=5"], {}, "parallel.tensor = 5: 32 attention heads do not divide by 5"),
        (["model.dtype=float32"], {}, "model.dtype = float32 cannot be planned; bfloat16 can"),
        (["kernels.graphs=off"], {}, "kernels.graphs = off cannot be planned; auto can"),
        (["speculation.tree=bush"], {}, "no tree 'bush'; shipped ones: chain1"),
    ],
)
def test_what_cannot_be_planned_names_the_value_and_what_is_allowed(
    settings: list[str], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(shipped(tmp_path, "8B", *settings), PlanOptions(**options))


def test_an_unreadable_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    config = hosted(load_config(None, [f"model.source={tmp_path}", "speculation.draft=null"]))
    with pytest.raises(ValueError, match=r"config.json cannot be read as JSON"):
        plan(config, PlanOptions())


def test_a_head_that_cannot_be_found_says_how_to_plan_without_it(tmp_path: Path) -> None:
    config = shipped(tmp_path, "8B", f"speculation.draft={tmp_path / 'nowhere'}")
    with pytest.raises(FileNotFoundError, match=r"To plan without .* --head eagle3"):
        plan(config, PlanOptions())
    with pytest.raises(ValueError, match=r"--head 'medusa': known kinds are eagle, eagle3, dense3"):
        head_kind("medusa")


def test_an_fp8_cache_takes_half_the_memory_of_the_target_alone(tmp_path: Path) -> None:
    plain = plan_memory(shipped(tmp_path, "8B", "cache.num_blocks=1000"), H100)
    small = plan_memory(in_same_place(tmp_path, "cache.dtype=fp8"), H100)
    assert (small.target_kv * 2, small.draft_kv) == (plain.target_kv, plain.draft_kv)


def test_a_feed_forward_of_four_bits_takes_less_memory(tmp_path: Path) -> None:
    plain = plan_memory(shipped(tmp_path, "8B", "cache.num_blocks=1000"), H100)
    small = plan_memory(in_same_place(tmp_path, "speculation.draft_weights=q4_mlp"), H100)
    assert plain.draft_weights - small.draft_weights == 3 * 4096 * 14336 * (2 - 0.625)
    with pytest.raises(ValueError, match=r"draft_weights = q8 is for CPUs; plain, q4 and q4_mlp"):
        plan_memory(in_same_place(tmp_path, "speculation.draft_weights=q8"), H100)


def in_same_place(folder: Path, *overrides: str) -> HostConfig:
    """As `shipped`, of files that it has written."""
    places = [f"model.source={folder / 'target'}", f"speculation.draft={folder / 'head'}"]
    settings = [*places, "cache.num_blocks=1000", *overrides]
    return hosted(load_config(Path(SHIPPED["8B"]), settings))
