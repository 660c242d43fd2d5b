"""The memory that a configuration needs on each GPU is counted before loading."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import load_config
from configs.resolve import HostConfig, with_sizes
from drafter.checkpoint import load_head
from drafter.heads.building import HeadBuilder
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.source import ModelFiles
from engine.models.footprint import GIB, held_bytes
from engine.models.llama import LlamaLoader
from engine.models.place import Place
from engine.parallel.shard import Shard
from engine.step.shape import StaticShape
from kernels.ops import Ops
from server.assembly.drafting import Target, allocate, tree_shape
from server.assembly.memory_plan import MemoryPlan, plan_memory
from tests.support.configurations import hosted
from tests.support.live_server import run_aerie
from tests.support.published_llamas import LLAMA31_8B, LLAMA33_70B
from tests.support.tiny_heads import write_tiny_head
from tests.support.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.training_commands import aerie

CPU = torch.device("cpu")
H100 = 80 * 10**9  # less than an H100 of 80 GB has
NUM_PARAMETERS = {"8B": 8_030_261_248, "70B": 70_553_706_496}  # as published
SHIPPED = {"8B": "llama31-8b-1xh100", "70B": "llama33-70b-8xh100"}
TARGETS = {"8B": LLAMA31_8B, "70B": LLAMA33_70B}
KV_BYTES = 2 * 2 * 128  # keys and values of a token, KV head and layer: bfloat16, D 128


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
    print("\n".join(plan.lines()))
    assert plan.total <= H100
    assert plan.num_sequences >= 32
    arch, ranks = TARGETS[size], plan.num_gpus
    norms = (2 * arch["num_hidden_layers"] + 1) * arch["hidden_size"]
    table = 4 * 131072 * 128  # rotary, float32; so are norms
    cut = 2 * (NUM_PARAMETERS[size] - norms) // ranks
    assert plan.target_weights == cut + 4 * norms + table
    tokens = (plan.num_blocks + 1) * 16  # and the scratch block
    heads = 8 // ranks
    assert plan.target_kv == tokens * heads * arch["num_hidden_layers"] * KV_BYTES
    assert plan.draft_kv == tokens * heads * KV_BYTES


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
    assert plan.lines()[0].endswith("on each of 16 GPUs of 74.5 GiB, each KV head on 2")
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


def test_without_a_head_nothing_is_kept_for_one(tmp_path: Path) -> None:
    config = shipped(tmp_path, "8B")
    speculation = config.speculation.model_copy(update={"draft": None})
    plan = plan_memory(config.model_copy(update={"speculation": speculation}), H100)
    assert (plan.draft_weights, plan.draft_kv) == (0, 0)


def test_lines_add_up() -> None:
    plan = MemoryPlan(2, 10 * GIB, GIB, GIB // 2, 2 * GIB, GIB, GIB, 1, 16, 1024)
    assert plan.num_sequences == 2
    lines = plan.lines()
    sizes = [line.split()[-2] for line in lines[1:-1]]
    assert sizes == ["1.00", "0.50", "2.00", "1.00", "1.00", "1.00", "3.50"]
    assert lines[-1] == "1024 cache blocks of 16 tokens: 2 sequences of 8192 tokens at once"
    short = dataclasses.replace(plan, num_blocks=511)
    assert short.num_sequences == 0


def test_the_command_prints_the_plan_and_needs_no_weights(tmp_path: Path) -> None:
    shipped(tmp_path, "70B")
    places = [f"model.source={tmp_path / 'target'}", f"speculation.draft={tmp_path / 'head'}"]
    arguments = ["plan-memory", "--config", SHIPPED["70B"], "--gpu-memory", "80GB", *places]
    done = run_aerie(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("bytes on each of 8 GPUs of 74.5 GiB\n  target weights ")
    refused = aerie(*arguments, "parallel.tensor=5")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("aerie: parallel.tensor = 5: 64 attention heads")
