"""Models of quantised checkpoints compute what their plain numbers do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoints.llama4_arch import Llama4Arch
from engine.checkpoints.source import ModelFiles
from engine.models.families import load_target
from engine.models.place import Place
from engine.parallel.shard import Shard
from kernels.ops import Ops
from tests.support.files.quantised_files import (
    FORMATS,
    FP8_CHANNEL,
    fused_experts,
    llama4_file,
    rewrite,
    separate_experts,
)
from tests.support.models.packed import CPU, PackedModel, whole
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.models.tiny_llama4 import write_tiny_llama4

SPEC = TinyLlama(num_layers=2, hidden_size=128, intermediate_size=256)
IDS = [5, 17, 200, 33, 9, 9, 120, 77, 300, 4]
IN_GROUPS = {"intermediate_size": 64, "intermediate_size_mlp": 160}  # of 32
LLAMA4 = {"fp8": FP8_CHANNEL, "int4": FORMATS["packed"], "fbgemm": FORMATS["fbgemm"]}


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelFiles("hf", folder, folder.name))


def logits(checkpoint: Checkpoint, ops: Ops) -> torch.Tensor:
    place = Place(ops, torch.float32, CPU)
    model = load_target(checkpoint.arch, checkpoint.stored, place, 64)
    return PackedModel(model, ops, torch.float32).run(whole(0, IDS, [3]))[0]


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    "name", ["fp8-channel", "fp8-blocks", "packed-zeros", "awq", "gptq-in-order"]
)
def test_a_llama_computes_with_the_plain_numbers(
    tmp_path: Path, request: pytest.FixtureRequest, name: str, backend: str
) -> None:
    model = write_tiny_llama(tmp_path, SPEC)
    rewrite(tmp_path, model, FORMATS[name])
    with torch.inference_mode():
        wanted = model(torch.tensor([IDS])).logits[0]
    got = logits(opened(tmp_path), request.getfixturevalue(f"{backend}_ops"))
    # Native kernels of groups round their inputs to 16 bits.
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", LLAMA4)
@torch.inference_mode()
def test_experts_are_read_one_by_one_or_from_one_tensor(
    tmp_path: Path, native_ops: Ops, reference_ops: Ops, name: str
) -> None:
    model, form = write_tiny_llama4(tmp_path, **IN_GROUPS), LLAMA4[name]
    write = fused_experts if name == "fbgemm" else separate_experts
    llama4_file(write(model, form), tmp_path, form)
    checkpoint = opened(tmp_path)
    assert isinstance(checkpoint.arch, Llama4Arch)
    assert checkpoint.arch.separate_experts
    wanted = model(torch.tensor([IDS])).logits[0]
    for ops in (native_ops, reference_ops):
        torch.testing.assert_close(logits(checkpoint, ops), wanted, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["fp8-channel", "packed-zeros", "gptq-2-all-inputs"])
def test_ranks_read_only_their_part(tmp_path: Path, native_ops: Ops, name: str) -> None:
    """Products of both ranks, side by side, are those of the whole weight."""
    rewrite(tmp_path, write_tiny_llama(tmp_path, SPEC), FORMATS[name])
    checkpoint, x = opened(tmp_path), torch.randn(3, 128)
    layers = []
    for shard in (Shard(), Shard(0, 2), Shard(1, 2)):
        place = Place(native_ops, torch.float32, CPU, shard)
        model = load_target(checkpoint.arch, checkpoint.stored, place, 64)
        layers.append(model.layers[0].mlp.gate_up.weight)  # type: ignore[attr-defined]
    whole_one, *parts = (native_ops.linear(x, weight) for weight in layers)
    gate, up = (
        torch.cat(side, dim=1) for side in zip(*(p.chunk(2, 1) for p in parts), strict=True)
    )
    torch.testing.assert_close(torch.cat((gate, up), dim=1), whole_one, atol=1e-5, rtol=0)
