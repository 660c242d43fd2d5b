"""The models and heads of all shipped configurations, built whole from the names and shapes of
their published files, on every rank: on the device `meta`, without numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import load_config
from configs.planning import shipped_heads, shipped_models
from configs.resolve import HostConfig
from configs.schema import ExpertCut
from drafter.checkpoint import load_head
from drafter.heads.building import HeadBuilder, LoadedHead, TargetWeights
from engine.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoints.quantised import groups as stored_groups
from engine.checkpoints.source import ModelFiles
from engine.models import loading
from engine.models.families import load_target
from engine.models.footprint import bytes_by_form, held_bytes
from engine.models.interface import LoadedModel
from engine.models.place import Place
from engine.parallel.shard import Shard
from kernels.registry import triton_ops
from server.assembly.planning import PlanOptions, plan
from tests.support.configurations import hosted
from tests.support.files.meta_files import MetaFolders, MetaTensor, times_read
from tests.support.files.published_tensors import eagle3_tensors, target_tensors

Tensors = dict[str, MetaTensor]
META = torch.device("meta")
OPS = triton_ops(torch.bfloat16)
H100 = 80 * 10**9


@dataclass(frozen=True)
class Published:
    """What the files of a shipped configuration hold."""

    num_tensors: int  # of the text model
    billions: float  # of its numbers, scales included; eight codes of four bits are one
    forms: tuple[str, ...] = ("bfloat16", "float32")


def head_files(name: str) -> tuple[dict[str, Any], Tensors]:
    """Of an EAGLE-3 head whose description ships: its config.json, and its tensors."""
    config = json.loads((shipped_heads()[name] / "config.json").read_text(encoding="utf-8"))
    layer = config.get("transformer_layer_config", config)
    prefix = "midlayer." if layer is config else "layers.0."
    drafted = config.get("draft_vocab_size", layer["vocab_size"])
    return config, eagle3_tensors(layer, layer["hidden_size"], drafted, prefix)


FP8_FORMS = ("bfloat16", "float32", "fp8")
Q4_FORMS = ("bfloat16", "float32", "q4")
SHIPPED = {
    "llama31-8b-1xh100": Published(291, 8.03),
    "llama33-70b-8xh100": Published(723, 70.55),
    "llama33-70b-8xh100-fp8": Published(723 + 7 * 80, 70.56, FP8_FORMS),
    "llama4-scout-1xh100-int4": Published(48 * (7 + 3 * 17 * 3) + 3, 18.73, Q4_FORMS),
    "llama4-scout-8xh100": Published(48 * 12 + 3, 107.8),
    "llama4-maverick-8xh100-fp8": Published(24 * (9 + 778) + 3, 400.8, FP8_FORMS),
}


@dataclass(frozen=True)
class Files:
    """A configuration whose model and head lie in two folders, and the tensors in them."""

    config: HostConfig
    target: Tensors
    head: Tensors
    opened: Checkpoint

    @property
    def ranks(self) -> int:
        return self.config.parallel.tensor

    def build(self, rank: int) -> tuple[LoadedModel, LoadedHead]:
        """What a rank holds."""
        shard, experts = Shard(rank, self.ranks), self.config.parallel.experts
        place = Place(OPS, torch.bfloat16, META, shard, experts=experts)
        arch = self.opened.arch
        max_len = self.config.model.max_model_len or arch.max_position_embeddings
        model = load_target(arch, self.opened.stored, place, max_len)
        shared = TargetWeights(model.arch, model.embedding.weight, model.head.weight)
        aux = self.config.speculation.aux_layers
        path = Path(str(self.config.speculation.draft))
        return model, load_head(path, HeadBuilder(shared, place, max_len), aux)


def files(name: str, experts: ExpertCut, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    shipped = load_config(Path(name))
    described = shipped_models()[shipped.model.source]
    config = json.loads(described.read_text(encoding="utf-8"))
    target, (head_config, head) = target_tensors(config), head_files(str(shipped.speculation.draft))
    folders = MetaFolders(monkeypatch)
    folders.write(folder / "target", config, target)
    folders.write(folder / "head", head_config, head)
    monkeypatch.setattr(loading, "cos_sin_table", table_without_numbers)
    monkeypatch.setattr(stored_groups, "_halves", torch.Tensor.half)
    places = [f"model.source={folder / 'target'}", f"speculation.draft={folder / 'head'}"]
    settings = [*places, f"parallel.experts={experts}"]
    opened = open_checkpoint(ModelFiles("hf", folder / "target", "target"))
    return Files(hosted(load_config(Path(name), settings)), target, head, opened)


def table_without_numbers(head_dim: int, max_len: int, *_: object) -> torch.Tensor:
    return torch.empty(max_len, head_dim, device=META)


def test_all_shipped_configurations_of_large_models_are_built_here() -> None:
    folder = Path(__file__).parents[3] / "configs" / "serve"
    assert {path.stem for path in folder.glob("llama*.yaml")} == set(SHIPPED)


HEAVY = ("llama4-maverick-8xh100-fp8", "tensor")  # each rank reads of all 9216 experts
CASES = [(name, "tensor") for name in SHIPPED] + [
    (name, "expert") for name in SHIPPED if "llama4" in name and "8x" in name
]


@pytest.mark.parametrize(
    ("name", "experts"),
    [pytest.param(*case, marks=pytest.mark.extended if case == HEAVY else ()) for case in CASES],
)
def test_every_tensor_lands_once_and_the_plan_is_what_a_gpu_holds(
    name: str, experts: ExpertCut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, published = files(name, experts, tmp_path, monkeypatch), SHIPPED[name]
    text = {
        tensor: each
        for tensor, each in found.target.items()
        if not tensor.startswith(("vision_model.", "multi_modal_projector."))
    }
    assert len(text) == published.num_tensors
    numbers = sum(torch.Size(each.shape).numel() for each in text.values())
    assert numbers / 1e9 == pytest.approx(published.billions, rel=2e-3)
    ranks = [found.build(rank) for rank in range(found.ranks)]
    for tensor, times in (times_read(text) | times_read(found.head)).items():
        if not tensor.endswith(".weight_shape"):  # two numbers, read when files are opened
            assert times in ({1}, {found.ranks}), tensor  # cut, or whole on every rank
    memory = plan(found.config, PlanOptions(batches=(1, 64))).memory
    for model, head in ranks:
        target = held_bytes(model)
        assert tuple(bytes_by_form(model)) == published.forms
        assert (memory.target_weights, memory.draft_weights) == (
            target,
            held_bytes(model, head) - target,
        )
    assert memory.total <= H100
    assert memory.num_sequences(8192) >= found.config.scheduler.max_num_seqs // 2
