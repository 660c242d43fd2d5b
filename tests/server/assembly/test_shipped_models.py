"""The models and heads of all shipped configurations, built whole from the names and shapes of
their published files, on every rank: on the device `meta`, without numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import load_config
from configs.planning import shipped_models
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
from tests.support.meta_files import MetaFolders, MetaTensor, times_read
from tests.support.published_tensors import eagle3_tensors, target_tensors

Tensors = dict[str, MetaTensor]
META = torch.device("meta")
OPS = triton_ops(torch.bfloat16)
H100 = 80 * 10**9
LAYER = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Published:
    """What the files of a shipped configuration hold."""

    num_tensors: int  # of the text model
    billions: float  # of its numbers, scales included; eight codes of four bits are one
    head: Callable[[dict[str, Any]], tuple[dict[str, Any], Tensors]]
    forms: tuple[str, ...] = ("bfloat16", "float32")


def _layer_of(target: dict[str, Any], **changes: int) -> dict[str, Any]:
    text = target.get("text_config", target)
    widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return LAYER | {name: text[name] for name in (*widths, "vocab_size")} | changes


def speculator(target: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """RedHatAI's: layout of speculators."""
    layer = _layer_of(target)
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": 32000,
        "norm_before_residual": True,
        "transformer_layer_config": layer,
    }
    return config, eagle3_tensors(layer, layer["hidden_size"], 32000, "layers.0.")


def of_nvidia(target: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    layer = _layer_of(target)
    ids = {"eagle_aux_hidden_state_layer_ids": [1, 23, 44], "use_aux_hidden_state": True}
    config = layer | {"architectures": ["LlamaForCausalLMEagle3"], "eagle_config": ids}
    return config, eagle3_tensors(layer, layer["hidden_size"], layer["vocab_size"], "midlayer.")


def of_specforge(target: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    layer = _layer_of(target, intermediate_size=32768)
    config = layer | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 32000}
    return config, eagle3_tensors(layer, layer["hidden_size"], 32000, "midlayer.")


FP8_FORMS = ("bfloat16", "float32", "fp8")
Q4_FORMS = ("bfloat16", "float32", "q4")
SHIPPED = {
    "llama31-8b-1xh100": Published(291, 8.03, speculator),
    "llama33-70b-8xh100": Published(723, 70.55, speculator),
    "llama33-70b-8xh100-fp8": Published(723 + 7 * 80, 70.56, speculator, FP8_FORMS),
    "llama4-scout-1xh100-int4": Published(48 * (7 + 3 * 17 * 3) + 3, 18.73, of_specforge, Q4_FORMS),
    "llama4-scout-8xh100": Published(48 * 12 + 3, 107.8, of_specforge),
    "llama4-maverick-8xh100-fp8": Published(24 * (9 + 778) + 3, 400.8, of_nvidia, FP8_FORMS),
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
    target, (head_config, head) = target_tensors(config), SHIPPED[name].head(config)
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
