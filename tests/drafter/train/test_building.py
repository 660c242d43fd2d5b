"""A configuration gives the head that it describes, or trains a published head further."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.training import HeadSettings
from drafter import manifest
from drafter.checkpoint import save_eagle, save_eagle3
from drafter.heads.config import HeadConfig
from drafter.source import SHIPPED
from drafter.train.head.building import (
    TargetTensors,
    build_network,
    head_config,
    published_path,
    published_vocabulary,
)
from drafter.train.head.network import DraftNetwork
from engine.checkpoints.manifest import expected_tensors
from tests.drafter.published_heads import DRAFT_VOCAB, HIDDEN, LAYOUTS, TARGET, Layout
from tests.drafter.train.networks import TRAINABLE, config_of, random_batch, unrolled

IDS = LAYOUTS["reference-eagle3"].target_ids()


def target() -> TargetTensors:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape in expected_tensors(TARGET).items()
    }
    return TargetTensors(TARGET, tensors.__getitem__)


def build(
    settings: HeadSettings, seed: int = 0, dtype: torch.dtype = torch.float32
) -> DraftNetwork:
    config = head_config(settings, TARGET)
    ids = IDS if config.draft_vocab_size == DRAFT_VOCAB else None
    return build_network(settings, config, target(), ids, 32, dtype, seed)


SETTINGS: dict[str, dict[str, Any]] = {
    "eagle3": {"kind": "eagle3", "draft_vocab_size": DRAFT_VOCAB, "init": "random"},
    "eagle3-from-target": {"kind": "eagle3", "intermediate_size": None},
    "eagle3-of-two": {"kind": "eagle3", "num_layers": 2, "aux_layers": (0, 7), "init": "random"},
    "eagle": {"kind": "eagle", "init": "random", "intermediate_size": 24},
    "dense": {"kind": "dense", "init": "random", "num_layers": 3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_network_has_the_tensors_of_its_head(name: str) -> None:
    settings = HeadSettings(**SETTINGS[name])
    config, network = head_config(settings, TARGET), build(settings)
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    expected = manifest.head_tensors(config, TARGET, shapes)
    known = expected.required | {
        manifest.LM_HEAD: expected.required.get(manifest.LM_HEAD, (131, 72))
    }
    wanted = expected.required if settings.kind != "eagle3" else known
    assert shapes == {key: shape for key, shape in wanted.items() if key != manifest.D2T}
    assert (manifest.FIRST_NORM in shapes) == (settings.kind != "eagle")
    assert config.kind == ("eagle3" if settings.kind == "eagle3" else "eagle")
    assert config.arch.num_layers == settings.num_layers
    assert config.arch.intermediate_size == (settings.intermediate_size or TARGET.intermediate_size)
    assert len(config.tap_layers(TARGET)) == {"eagle3": 3, "eagle3-of-two": 2}.get(
        name, 3 if settings.kind == "eagle3" else 1
    )


def test_the_seed_decides_random_weights() -> None:
    settings = HeadSettings(**SETTINGS["eagle3"])
    one, same, other = (build(settings, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_frozen_rows_have_the_given_dtype_and_weights_are_float32(kind: str) -> None:
    network = build(HeadSettings(**SETTINGS[kind]), dtype=torch.bfloat16)
    assert network.embedding.dtype == torch.bfloat16
    assert torch.equal(network.embedding, target().embedding.bfloat16())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    if kind == "eagle":
        assert torch.equal(network.head_weight, target().lm_head.bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_vocab_size": 132}, r"head\.draft_vocab_size 132 must be at most 131"),
        ({"aux_layers": (1, 9)}, r"target layers \[1, 9\].*layers 0 to 7"),
    ],
)
def test_what_the_target_cannot_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_config(HeadSettings(**changes), TARGET)


def settings_for(layout: Layout, path: Path, **changes: Any) -> HeadSettings:
    said: dict[str, Any] = {"kind": layout.kind, "num_layers": layout.num_layers, "init": str(path)}
    if layout.kind == "eagle3" and layout.draft_vocab == DRAFT_VOCAB:
        said["draft_vocab_size"] = DRAFT_VOCAB
    return HeadSettings(**(said | changes))


def shared_with(found: TargetTensors, layout: Layout) -> dict[str, Tensor]:
    """Tensors that the layout has and training shares with the target, with the target's values."""
    shared = {manifest.EMBEDDING: found.embedding, manifest.LM_HEAD: found.lm_head}
    if layout.kind == "eagle3":
        del shared[manifest.LM_HEAD]
    return {
        layout.rename(n): t for n, t in shared.items() if n.removesuffix(".weight") in layout.own
    }


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_published_head_is_trained_further_as_it_is(name: str, tmp_path: Path) -> None:
    layout, extra = TRAINABLE[name], shared_with(target(), TRAINABLE[name])
    layout.write(tmp_path, lambda tensors: tensors.update(extra))
    settings = settings_for(layout, tmp_path)
    config, network = head_config(settings, TARGET), build(settings)
    assert config == config_of(layout)  # its rotary base, residual and taps, not the target's
    weights = layout.tensors()
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[key]), key
    ids = published_vocabulary(tmp_path, TARGET)
    assert ids is None if not layout.mapped else torch.equal(ids, layout.target_ids())


def test_a_head_that_ships_is_trained_further_by_its_name() -> None:
    for name in SHIPPED:
        assert (published_path(HeadSettings(init=name)) / "config.json").is_file()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_published_network_is_read_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    settings = HeadSettings(**SETTINGS[name])
    config, network = head_config(settings, TARGET), build(settings)
    write(tmp_path / "head", config, network.state_dict())
    again = settings.model_copy(update={"init": str(tmp_path / "head")})
    read = head_config(again, TARGET)
    assert read == dataclasses.replace(config, aux_layers=read.aux_layers)
    assert read.tap_layers(TARGET) == config.tap_layers(TARGET)
    found = build(again).state_dict()
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_head_that_becomes_deeper_begins_with_the_same_states(
    num_layers: int, tmp_path: Path
) -> None:
    settings = HeadSettings(draft_vocab_size=DRAFT_VOCAB, num_layers=num_layers, init="random")
    before = build(settings)
    write(tmp_path / "head", head_config(settings, TARGET), before.state_dict())
    after = build(settings.model_copy(update={"num_layers": 4, "init": str(tmp_path / "head")}))
    batch = random_batch(LAYOUTS["reference-eagle3"], (14, 9), ([range(4, 12)], [range(2, 9)]))
    for expected, found in zip(unrolled(before, batch, 3), unrolled(after, batch, 3), strict=True):
        assert torch.equal(found.states, expected.states)
        assert torch.equal(found.head_inputs, expected.head_inputs)
    theirs = target().read(f"model.layers.{TARGET.num_layers - 1}.self_attn.k_proj.weight")
    assert torch.equal(after.layer(3).self_attn.k_proj.weight, theirs)


def test_a_head_of_other_widths_becomes_no_deeper(tmp_path: Path) -> None:
    layout = LAYOUTS["reference-eagle3"]
    settings = settings_for(layout, layout.write(tmp_path), num_layers=2)
    with pytest.raises(ValueError, match="begins with layers of the target needs its"):
        build(settings)


def write(path: Path, config: HeadConfig, tensors: dict[str, Tensor]) -> None:
    if config.kind == "eagle":
        save_eagle(path, config, TARGET, tensors)
    else:
        ids = IDS if config.draft_vocab_size == DRAFT_VOCAB else None
        save_eagle3(path, config, TARGET, tensors, ids)


def test_a_head_that_reads_with_the_targets_lm_head_begins_with_it(tmp_path: Path) -> None:
    layout = LAYOUTS["nvidia-eagle3"]
    layout.write(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert torch.equal(build(settings_for(layout, tmp_path)).head_weight, target().lm_head)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("reference-eagle", {"num_layers": 2}, "has num_layers 1; head.num_layers is 2"),
        ("reference-eagle3", {"draft_vocab_size": 40}, "draft_vocab_size 37; head.* is 40"),
        ("reference-eagle3", {"draft_vocab_size": None}, "draft_vocab_size 37; head.* is 131"),
        ("reference-eagle3", {"intermediate_size": 99}, "intermediate_size 100; head.* is 99"),
        ("reference-eagle3", {"aux_layers": (1, 2, 3)}, r"aux_layers \(2, 4, 5\); .* \(1, 2, 3\)"),
        ("reference-eagle", {"kind": "dense"}, "has kind 'eagle'; head.kind is 'dense'"),
        ("meta-dense", {"kind": "eagle"}, "has kind 'dense'; head.kind is 'eagle'"),
        ("meta-dense", {"kind": "eagle3"}, "has kind 'dense'; head.kind is 'eagle3'"),
        ("speculators-eagle3.1", {}, "has norm_before_fc; heads with it cannot be trained"),
        ("sglang-eagle3-with-norms", {}, "has fc_norm"),
        ("nvidia-eagle3-of-the-last-hidden-state", {}, "has norm_output"),
        ("vllm-eagle3-of-another-width", {}, f"has hidden_size 44; .* target's {HIDDEN}"),
    ],
)
def test_a_published_head_that_is_not_as_described_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    settings = settings_for(layout, layout.write(tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        head_config(settings, TARGET)


@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_a_head_with_rows_of_its_own_where_training_shares_is_refused(
    part: str, tmp_path: Path
) -> None:
    layout = LAYOUTS["vllm-eagle"]
    extra = shared_with(target(), layout)
    own = f"{layout.rename(part)}.weight"
    layout.write(tmp_path, lambda tensors: tensors.update(extra | {own: extra[own] + 1}))
    with pytest.raises(ValueError, match=f"{part}.weight is not the target's"):
        build(settings_for(layout, tmp_path))


def test_no_head_in_the_directory_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        head_config(HeadSettings(init=str(tmp_path)), TARGET)
