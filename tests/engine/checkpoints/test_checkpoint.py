"""Safetensors directories load completely or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoints.manifest import expected_tensors
from engine.checkpoints.source import ModelFiles
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def open_folder(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelFiles("hf", folder, folder.name))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "spec",
    [
        TinyLlama(),
        TinyLlama(tied=True, num_kv_heads=1, head_dim=128),
        TinyLlama(attention_bias=True, mlp_bias=True, llama3_rope=True),
        TinyLlama(dtype=torch.bfloat16, shard_bytes=100_000),
        TinyLlama(dtype=torch.float16, tied=True, shard_bytes=100_000),
    ],
    ids=["plain", "tied", "biases", "bf16-sharded", "f16-tied-sharded"],
)
def test_every_tensor_is_read_as_it_was_saved(tmp_path: Path, spec: TinyLlama) -> None:
    model = write_tiny_llama(tmp_path, spec)
    sharded = (tmp_path / "model.safetensors.index.json").is_file()
    assert sharded == (spec.shard_bytes is not None)
    checkpoint = open_folder(tmp_path)
    saved = model.state_dict()
    assert list(dict(checkpoint.tensors())) == list(expected_tensors(checkpoint.arch))
    for name, tensor in checkpoint.tensors():
        assert tensor.dtype == spec.dtype
        assert torch.equal(tensor, saved[name]), name
    assert checkpoint.arch == LlamaArch.from_hf_config(model.config.to_dict())
    assert (checkpoint.eos_token_ids, checkpoint.bos_token_id) == ((2,), 1)


def test_expected_tensors_are_exactly_those_of_transformers(tmp_path: Path) -> None:
    for spec in (TinyLlama(), TinyLlama(attention_bias=True), TinyLlama(mlp_bias=True)):
        model = write_tiny_llama(tmp_path, spec)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert expected_tensors(LlamaArch.from_hf_config(model.config.to_dict())) == shapes


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(ValueError, match=f"{tmp_path.name}: missing tensor {Q_PROJ}"):
        open_folder(tmp_path)


def test_unexpected_tensor_is_named(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update(surprise=torch.zeros(1)))
    with pytest.raises(ValueError, match="unexpected tensor surprise"):
        open_folder(tmp_path)


def test_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({NORM: torch.zeros(63)}))
    with pytest.raises(ValueError, match=rf"{NORM} has shape \[63\].*asks for \[64\]"):
        open_folder(tmp_path)


def test_tensor_of_another_dtype_is_named(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({NORM: torch.zeros(64, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=f"{NORM} is I8; supported are F32, F16, BF16"):
        open_folder(tmp_path)


def test_leftovers_that_carry_nothing_are_ignored_with_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_tiny_llama(tmp_path, TinyLlama(tied=True))
    leftovers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32),
        "lm_head.weight": model.lm_head.weight.detach().clone(),
    }
    rewrite(tmp_path, lambda tensors: tensors.update(leftovers))
    with caplog.at_level(logging.INFO):
        checkpoint = open_folder(tmp_path)
    assert "inv_freq" in caplog.text
    assert "lm_head.weight" in caplog.text
    assert not leftovers.keys() & dict(checkpoint.tensors()).keys()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_head_of_its_own_is_used_although_the_configuration_says_tied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_llama(tmp_path, TinyLlama(tied=True))
    own = torch.randn(384, 64)
    own[:380] = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"][:380]
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": own}))
    checkpoint = open_folder(tmp_path)
    oracle = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not checkpoint.arch.tie_word_embeddings
    assert torch.equal(checkpoint.tensor("lm_head.weight"), oracle.lm_head.weight)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), own)
    assert "lm_head.weight differs from model.embed_tokens.weight and is used" in caplog.text


def test_a_missing_head_is_the_embedding_although_the_configuration_says_untied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    checkpoint = open_folder(tmp_path)
    assert checkpoint.arch.tie_word_embeddings
    assert "there is no lm_head.weight" in caplog.text


def test_a_tied_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, TinyLlama(tied=True))
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(383, 64)}))
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \[383, 64\]"):
        open_folder(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_weights_are_refused_naming_the_file(tmp_path: Path, keep: int) -> None:
    write_tiny_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        open_folder(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, TinyLlama(shard_bytes=100_000))
    shard = sorted(tmp_path.glob("model-00002-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=f"names the shard '{shard.name}'"):
        open_folder(tmp_path)


def test_shards_outside_the_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_tiny_llama(folder, TinyLlama(shard_bytes=100_000))
    (tmp_path / "outside.safetensors").write_bytes(b"")
    index = {"weight_map": {NORM: "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside"):
        open_folder(folder)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    save_file({NORM: torch.zeros(64)}, tmp_path / "more.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"tensor {NORM} is also in"):
        open_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"architectures": ["GPT2LMHeadModel"]}'])
def test_unusable_configuration_names_the_file(tmp_path: Path, content: str) -> None:
    write_tiny_llama(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        open_folder(tmp_path)
