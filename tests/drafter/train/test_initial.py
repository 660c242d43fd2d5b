"""A head that starts with the target's last layers has their weights and reads their input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from drafter.heads.untrained import eagle3_config, random_eagle3
from drafter.train.head.initial import SMALL, weights_from_target
from engine.checkpoints.families import read_text_model
from engine.checkpoints.manifest import expected_tensors
from tests.drafter.published_heads import DRAFT_VOCAB, LAYOUTS, TARGET
from tests.support.models.tiny_llama4 import llama4_config

H = TARGET.hidden_size


def target_tensors(tied: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    arch = dataclasses.replace(TARGET, tie_word_embeddings=tied)
    shapes = expected_tensors(arch)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("num_layers", [1, 2])
def test_layers_are_the_targets_last_ones(num_layers: int) -> None:
    config, theirs = eagle3_config(TARGET, DRAFT_VOCAB, num_layers), target_tensors()
    before = random_eagle3(config, TARGET, seed=3)
    kept, ids = {n: t.clone() for n, t in before.items()}, LAYOUTS["reference-eagle3"].target_ids()
    found = weights_from_target(before, config, TARGET, theirs.__getitem__, ids)
    assert all(torch.equal(before[name], kept[name]) for name in kept)  # the caller's tensors stay
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in kept.items()}
    first = f"model.layers.{TARGET.num_layers - num_layers}"
    for part in ("q", "k", "v"):
        name = f"self_attn.{part}_proj.weight"  # reads [embedding; feature]
        assert torch.equal(found[f"layers.0.{name}"][:, H:], theirs[f"{first}.{name}"])
        assert torch.equal(found[f"layers.0.{name}"][:, :H], kept[f"layers.0.{name}"][:, :H])
    same = {
        "layers.0.hidden_norm": f"{first}.input_layernorm",
        "layers.0.self_attn.o_proj": f"{first}.self_attn.o_proj",
        "layers.0.post_attention_layernorm": f"{first}.post_attention_layernorm",
        "norm": "model.norm",
    }
    for part in ("gate", "up", "down"):
        same[f"layers.0.mlp.{part}_proj"] = f"{first}.mlp.{part}_proj"
    if num_layers == 2:
        rest = [name for name in kept if name.startswith("layers.1.")]
        same |= {n.removesuffix(".weight"): f"model.{n.removesuffix('.weight')}" for n in rest}
        same = {a: b.replace("model.layers.1.", "model.layers.7.") for a, b in same.items()}
    for name, source in same.items():
        assert torch.equal(found[f"{name}.weight"], theirs[f"{source}.weight"]), name
    assert torch.equal(found["layers.0.input_layernorm.weight"], torch.ones(H))


def test_the_highest_tap_passes_through() -> None:
    config, theirs = eagle3_config(TARGET), target_tensors()
    before = random_eagle3(config, TARGET, seed=3)
    found = weights_from_target(before, config, TARGET, theirs.__getitem__, None)
    extra = found["fc.weight"] - before["fc.weight"] * SMALL
    expected = torch.cat((torch.zeros(H, 2 * H), torch.eye(H)), dim=1)
    torch.testing.assert_close(extra, expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_lm_head_is_the_targets_for_the_draft_vocabulary(tied: bool, reduced: bool) -> None:
    target = dataclasses.replace(TARGET, tie_word_embeddings=tied)
    ids = LAYOUTS["reference-eagle3"].target_ids() if reduced else None
    config, theirs = eagle3_config(target, DRAFT_VOCAB if reduced else None), target_tensors(tied)
    before = random_eagle3(config, target, seed=3)
    found = weights_from_target(before, config, target, theirs.__getitem__, ids)
    rows = theirs["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert torch.equal(found["lm_head.weight"], rows if ids is None else rows[ids])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 81}, r"intermediate_size 80, not 81; head.init 'random'"),
        ({"num_kv_heads": 2}, r"num_kv_heads 4, not 2"),
        ({"num_layers": 9}, r"at most its 8, not head\.num_layers 9"),
    ],
)
def test_heads_of_other_shapes_are_refused(change: dict[str, int], message: str) -> None:
    config = eagle3_config(TARGET)
    config = dataclasses.replace(config, arch=dataclasses.replace(config.arch, **change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        weights_from_target({}, config, TARGET, target_tensors().__getitem__, None)


def test_other_kinds_are_refused() -> None:
    config = dataclasses.replace(eagle3_config(TARGET), kind="eagle")
    with pytest.raises(ValueError, match="for eagle3 and peagle heads, not 'eagle'"):
        weights_from_target({}, config, TARGET, target_tensors().__getitem__, None)


def test_layers_of_other_architectures_are_refused() -> None:
    target = read_text_model(llama4_config().to_dict()).arch
    config = eagle3_config(target)
    with pytest.raises(ValueError, match=r"layers of this target; head\.init 'random' can"):
        weights_from_target({}, config, target, {}.__getitem__, None)
