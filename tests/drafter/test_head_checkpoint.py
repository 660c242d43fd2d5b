"""Draft heads load completely or not at all, and a saved head is read back."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from drafter.checkpoint import load_head, save_eagle3
from drafter.heads import building
from drafter.heads.building import HeadBuilder, LoadedHead
from drafter.heads.config import AUX_IDS, HeadConfig
from drafter.heads.eagle import EagleHead
from drafter.heads.eagle3 import Eagle3Head
from drafter.heads.interface import DraftContext
from drafter.heads.untrained import eagle3_config, random_eagle3
from engine.checkpoints.arch import LlamaArch
from engine.kv.storage import KVStorage
from engine.models.place import Place
from kernels.ops import Ops
from kernels.registry import build_ops
from tests.drafter.published_heads import (
    CPU,
    DRAFT_VOCAB,
    HIDDEN,
    LAYOUTS,
    TARGET,
    VOCAB,
    TargetWeights,
)

Change = Callable[[dict[str, Tensor]], object]
EAGLE3 = LAYOUTS["reference-eagle3"]
Q_PROJ = "midlayer.self_attn.q_proj.weight"


def load(folder: Path, ops: Ops, target: LlamaArch = TARGET) -> LoadedHead:
    return load_head(folder, TargetWeights.of(ops).builder(target))


def replaced(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_loads_as_its_kind(name: str, reference_ops: Ops, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    head = load(layout.write(tmp_path), reference_ops)
    assert isinstance(head, Eagle3Head if layout.kind == "eagle3" else EagleHead)
    assert len(head.layers) == head.arch.num_layers == layout.num_layers
    if layout.mapped:
        assert head.target_ids is not None
        assert torch.equal(head.target_ids, layout.target_ids())
    else:
        assert head.target_ids is None
    if isinstance(head, EagleHead):
        assert (head.norm is not None) == (layout.kind == "dense")
        assert (head.first_norm is not None) == (layout.kind == "dense")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("fc.weight"), r"missing tensor fc.weight, of shape \[72, 216\]"),
        (without(Q_PROJ), r"missing tensor layers.0.self_attn.q_proj.weight"),
        (without("d2t"), r"missing tensor d2t, of shape \[37\]"),
        (without("lm_head.weight"), r"missing tensor lm_head.weight, of shape \[37, 72\]"),
        (replaced("surprise", torch.zeros(1)), r"safetensors: tensor surprise is unexpected"),
        (
            replaced("midlayer.self_attn.q_norm.weight", torch.zeros(20)),
            "q_norm.weight is unexpected",
        ),
        (
            replaced(Q_PROJ, torch.zeros(120, 72)),
            rf"model.safetensors: tensor {Q_PROJ} has shape \[120, 72\].*ask for \[120, 144\]",
        ),
        (replaced("fc.weight", torch.zeros(72, 144)), r"fc.weight has shape \[72, 144\].*216"),
        (replaced("lm_head.weight", torch.zeros(36, 72)), r"\[36, 72\].*ask for \[37, 72\]"),
        (replaced("t2d", torch.zeros(130, dtype=torch.bool)), r"t2d has shape \[130\].*\[131\]"),
        (replaced("d2t", torch.zeros(37)), "tensor d2t is F32; supported are I64, I32"),
        (replaced("norm.weight", torch.ones(72).char()), "norm.weight is I8; supported are F32"),
        (replaced("d2t", torch.full((37,), 100)), "d2t maps draft id 31 to 131"),
        (replaced("t2d", torch.zeros(131, dtype=torch.bool)), "t2d does not mark target id"),
        (
            replaced("layers.0.hidden_norm.weight", torch.ones(72)),
            "hidden_norm.weight is the same as .*tensor layers.0.hidden_norm.weight",
        ),
    ],
)
def test_tensor_at_fault_is_named(
    change: Change, message: str, reference_ops: Ops, tmp_path: Path
) -> None:
    EAGLE3.write(tmp_path / "head", change)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "head", reference_ops)
    assert str(tmp_path / "head") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("meta-dense", without("norm.weight"), "missing tensor norm.weight"),
        (
            "meta-dense",
            without("layers.0.input_layernorm.weight"),
            "missing tensor layers.0.input_layernorm.weight",
        ),
        ("reference-eagle-with-bias", without("fc.bias"), "missing tensor fc.bias"),
        (
            "reference-eagle-with-bias",
            without("layers.1.input_layernorm.weight"),
            "missing tensor layers.1.input_layernorm",
        ),
        ("reference-eagle", replaced("fc.bias", torch.zeros(72)), "fc.bias is unexpected"),
        ("reference-eagle", replaced("d2t", torch.zeros(131).long()), "d2t is unexpected"),
        (
            "vllm-eagle3-of-another-width",
            without("model.embed_tokens.weight"),
            r"missing tensor embed_tokens.weight, of shape \[131, 44\]",
        ),
    ],
)
def test_each_kind_needs_its_own_tensors(
    name: str, change: Change, message: str, reference_ops: Ops, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(LAYOUTS[name].write(tmp_path, change), reference_ops)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "the head is for a target of hidden_size 72, this one has 64"),
        ({"vocab_size": 128}, "the head is for a target of vocab_size 131, this one has 128"),
    ],
)
@pytest.mark.parametrize("name", ["reference-eagle", "reference-eagle3"])
def test_head_of_another_target_is_refused(
    name: str, change: dict[str, int], message: str, reference_ops: Ops, tmp_path: Path
) -> None:
    target = dataclasses.replace(TARGET, **change)  # type: ignore[arg-type]
    LAYOUTS[name].write(tmp_path)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        load(tmp_path, reference_ops, target)


def test_a_target_of_few_layers_has_no_taps_for_eagle3(reference_ops: Ops, tmp_path: Path) -> None:
    target = dataclasses.replace(TARGET, num_layers=2)
    head = load(LAYOUTS["reference-eagle"].write(tmp_path / "eagle"), reference_ops, target)
    assert head.tap_layers == (2,)  # the final norm's output: the target has 2 layers
    with pytest.raises(ValueError, match=r"config\.json: .*this target has layers 0 to 1"):
        load(EAGLE3.write(tmp_path / "eagle3"), reference_ops, target)


@pytest.mark.parametrize("content", ["{", "[]", '{"architectures": ["GPT2LMHeadModel"]}'])
def test_unusable_configuration_names_the_file_once(
    content: str, reference_ops: Ops, tmp_path: Path
) -> None:
    (EAGLE3.write(tmp_path) / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        load(tmp_path, reference_ops)
    assert str(caught.value).count("config.json") == 1


def test_pickled_weights_are_refused_with_the_way_to_convert_them(
    reference_ops: Ops, tmp_path: Path
) -> None:
    (EAGLE3.write(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds pytorch_model\.bin only.*save_file"):
        load(tmp_path, reference_ops)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        load(tmp_path, reference_ops)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_weights_are_refused_naming_the_file(
    keep: int, reference_ops: Ops, tmp_path: Path
) -> None:
    path = EAGLE3.write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        load(tmp_path, reference_ops)


def test_tensors_of_the_target_are_ignored(reference_ops: Ops, tmp_path: Path) -> None:
    of_target = {
        "verifier_norm.weight": torch.ones(72),
        "verifier_lm_head.weight": torch.ones(37, 72),
    }
    load(EAGLE3.write(tmp_path, lambda tensors: tensors.update(of_target)), reference_ops)


def test_rotary_tables_are_ignored_with_a_log_line(
    reference_ops: Ops, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leftover = replaced("midlayer.self_attn.rotary_emb.inv_freq", torch.ones(10))
    with caplog.at_level(logging.INFO):
        load(EAGLE3.write(tmp_path, leftover), reference_ops)
    assert "inv_freq is ignored" in caplog.text


def test_what_a_head_leaves_open_logs_a_warning(
    reference_ops: Ops, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = {AUX_IDS: [2, 4, 5]}
    load(EAGLE3.write(tmp_path, **told), reference_ops)
    assert caplog.text == ""
    load(EAGLE3.write(tmp_path, **told, max_position_embeddings=32), reference_ops)
    assert "trained for 32 positions and will draft at up to 64" in caplog.text
    caplog.clear()
    load(EAGLE3.write(tmp_path), reference_ops)
    assert f"names no target layers ({AUX_IDS}): the usual ones, [2, 4, 5], are" in caplog.text


@pytest.mark.parametrize("name", ["reference-eagle3", "reference-eagle", "meta-dense"])
def test_the_tensors_decide_how_many_layers_a_head_has(
    name: str, reference_ops: Ops, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = LAYOUTS[name]
    head = load(layout.write(tmp_path, num_hidden_layers=40), reference_ops)
    assert len(head.layers) == head.arch.num_layers == layout.num_layers
    assert f"num_hidden_layers is 40, but the files hold {layout.num_layers}" in caplog.text


def test_a_shard_that_the_index_names_must_be_there(reference_ops: Ops, tmp_path: Path) -> None:
    folder = LAYOUTS["meta-dense"].write(tmp_path)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names the shard 'model-2"):
        load(folder, reference_ops)


def test_absent_and_repeated_weights_are_shared_with_the_target(
    native_ops: Ops, tmp_path: Path
) -> None:
    shared = TargetWeights.of(native_ops)

    def loaded(layout: str, change: Change) -> LoadedHead:
        return load_head(LAYOUTS[layout].write(tmp_path / layout, change), shared.builder())

    absent = loaded("reference-eagle", lambda tensors: None)
    assert absent.embedding.weight is shared.packed_embedding
    assert absent.lm_head.weight is shared.packed_lm_head
    repeated = replaced("model.embed_tokens.weight", shared.embedding.clone())
    half = loaded("vllm-eagle", repeated)  # its lm_head differs from the target's
    assert half.embedding.weight is shared.packed_embedding
    assert half.lm_head.weight is not shared.packed_lm_head
    whole_vocab = loaded("nvidia-eagle3", without("lm_head.weight"))
    assert whole_vocab.lm_head.weight is shared.packed_lm_head


def test_weights_are_compared_as_they_are_packed(native_cache: Path, tmp_path: Path) -> None:
    ops = build_ops("reference", CPU, torch.bfloat16, 2, native_cache)
    embedding = TargetWeights.of(ops).embedding
    packed = ops.pack_linear(embedding.bfloat16(), None)
    wide = replaced("model.embed_tokens.weight", embedding)  # float32 in the file
    folder = LAYOUTS["vllm-eagle"].write(tmp_path, wide)
    place = Place(ops, torch.bfloat16, CPU)
    head = load_head(folder, HeadBuilder(building.TargetWeights(TARGET, packed, packed), place, 64))
    assert head.embedding.weight is packed
    assert head.lm_head.weight.data.dtype == torch.bfloat16


def test_a_mapping_of_every_id_to_itself_is_none(reference_ops: Ops, tmp_path: Path) -> None:
    identity = {"d2t": torch.zeros(VOCAB).long(), "t2d": torch.ones(VOCAB).bool()}
    folder = LAYOUTS["nvidia-eagle3"].write(tmp_path, lambda tensors: tensors.update(identity))
    assert load(folder, reference_ops).target_ids is None


@pytest.mark.parametrize("name", [name for name in LAYOUTS if LAYOUTS[name].kind == "eagle3"])
def test_saved_head_is_read_back_bit_by_bit(name: str, reference_ops: Ops, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    config = HeadConfig.from_json(layout.config)
    tensors = {k: v for k, v in layout.tensors().items() if k not in ("d2t", "t2d")}
    ids = layout.target_ids() if layout.mapped else None
    path = tmp_path / "new" / "head"
    save_eagle3(path, config, TARGET, tensors, ids)
    assert [child.name for child in path.parent.iterdir()] == ["head"]  # nothing left behind
    first = load(layout.write(tmp_path / "first"), reference_ops)
    again = load(path, reference_ops)
    assert (again.arch, again.tap_layers) == (first.arch, first.tap_layers)
    features = tuple(torch.randn(3, HIDDEN) for _ in first.tap_layers)
    ctx = DraftContext(reference_ops, KVStorage((), ()))
    assert torch.equal(again.fuse(features, ctx), first.fuse(features, ctx))
    stored = load_file(path / "model.safetensors")
    for key, tensor in tensors.items():
        assert torch.equal(stored[key.replace("layers.0.", "midlayer.")], tensor), key
    if ids is not None:
        assert again.target_ids is not None
        assert torch.equal(again.target_ids, ids)


def test_saved_head_has_the_published_names(tmp_path: Path) -> None:
    config = eagle3_config(TARGET, DRAFT_VOCAB)
    ids = EAGLE3.target_ids()
    save_eagle3(tmp_path / "head", config, TARGET, random_eagle3(config, TARGET, seed=1), ids)
    stored = load_file(tmp_path / "head" / "model.safetensors")
    layer = [f"self_attn.{part}_proj" for part in "qkvo"]
    layer += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    layer += ["hidden_norm", "input_layernorm", "post_attention_layernorm"]
    names = [f"midlayer.{part}.weight" for part in layer]
    names += ["fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"]
    assert sorted(stored) == sorted(names)
    assert torch.equal(stored["d2t"] + torch.arange(DRAFT_VOCAB), ids)
    assert stored["t2d"].nonzero().flatten().tolist() == ids.tolist()
    content = json.loads((tmp_path / "head" / "config.json").read_text())
    assert content["architectures"] == ["LlamaForCausalLMEagle3"]
    assert content["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert content["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]


@pytest.mark.parametrize(
    ("change", "ids", "message"),
    [
        (without("norm.weight"), None, "missing tensor norm.weight"),
        (replaced("fc.weight", torch.zeros(2, 2)), None, r"fc.weight has shape \[2, 2\]"),
        (lambda tensors: None, torch.arange(VOCAB) + 1, "d2t maps draft id 130 to 131"),
        (lambda tensors: None, torch.arange(5), r"d2t has shape \[5\]"),
    ],
)
def test_a_head_that_would_not_load_is_not_saved(
    change: Change, ids: Tensor | None, message: str, tmp_path: Path
) -> None:
    config = eagle3_config(TARGET)
    tensors = random_eagle3(config, TARGET, seed=1)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        save_eagle3(tmp_path / "head", config, TARGET, tensors, ids)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    config = eagle3_config(TARGET)
    tensors = random_eagle3(config, TARGET, seed=1)
    with pytest.raises(FileExistsError, match="exists already"):
        save_eagle3(tmp_path, config, TARGET, tensors, None)


def test_random_heads_follow_their_seed(tmp_path: Path) -> None:
    config = eagle3_config(TARGET, DRAFT_VOCAB, num_layers=2)
    first, same, other = (random_eagle3(config, TARGET, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    assert first["lm_head.weight"].shape == (DRAFT_VOCAB, HIDDEN)
    assert "layers.1.input_layernorm.weight" in first
    assert torch.equal(first["norm.weight"], torch.ones(HIDDEN))
