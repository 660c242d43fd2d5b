"""Tensors are read in part, and the bytes of a model are counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from torch import Tensor

from drafter.source import resolve_draft
from engine.checkpoints.checkpoint import SafetensorsCheckpoint, read_arch
from engine.models.footprint import EVERY, held_bytes, layers_with_progress
from tests.support.files.published_llamas import LLAMA31_8B
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama


@pytest.mark.parametrize(
    "index",
    [
        slice(None),
        slice(5, 9),
        slice(8, 8),
        (slice(None), slice(3, 7)),
        (slice(2, 6), slice(1, 2)),
    ],
)
def test_indexing_reads_that_part_of_a_file(
    index: slice | tuple[slice, ...], tmp_path: Path
) -> None:
    model = write_tiny_llama(tmp_path, TinyLlama(shard_bytes=100_000))
    checkpoint = SafetensorsCheckpoint(tmp_path)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        part = checkpoint.stored(name)[index]
        assert torch.equal(part, model.state_dict()[name][index])


def test_a_vector_is_read_whole_or_in_part(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path, TinyLlama(attention_bias=True))
    checkpoint, name = SafetensorsCheckpoint(tmp_path), "model.layers.0.self_attn.q_proj.bias"
    bias = model.state_dict()[name]
    assert torch.equal(checkpoint.stored(name)[:], bias)
    assert torch.equal(checkpoint.stored(name)[64:128], bias[64:128])


@pytest.mark.parametrize("place", ["directory", "hub"])
def test_the_shape_of_a_model_needs_no_weights(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA31_8B), encoding="utf-8")
    fetch = Mock(return_value=str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    source = str(tmp_path) if place == "directory" else "org/name"
    assert read_arch(source).num_layers == 32
    if place == "hub":
        assert fetch.call_args.kwargs["allow_patterns"] == ["config.json"]
        assert resolve_draft("org/head", "org/name", config_only=True) == tmp_path
        assert fetch.call_args.kwargs["allow_patterns"] == ["config.json"]


def test_a_wrong_shape_names_its_file(tmp_path: Path) -> None:
    wrong = LLAMA31_8B | {"num_key_value_heads": 5}
    (tmp_path / "config.json").write_text(json.dumps(wrong), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.json: num_kv_heads 5 must divide"):
        read_arch(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no config.json at .*nowhere"):
        read_arch(str(tmp_path / "nowhere"))


@dataclass(frozen=True)
class Part:
    weight: Tensor
    more: tuple[Tensor | None, ...]
    name: str = "part"


def test_a_tensor_that_is_held_twice_counts_once() -> None:
    shared = torch.zeros(3, 5, dtype=torch.bfloat16)
    inner = Part(shared, (torch.zeros(7), None))
    assert held_bytes(Part(shared, ()), (inner, inner)) == 30 + 28


def test_progress_is_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    def clock() -> Iterator[float]:
        seconds = 0.0
        while True:
            yield seconds
            seconds += EVERY / 2

    with caplog.at_level(logging.INFO):
        found = list(layers_with_progress(6, clock().__next__))
    assert found == list(range(6))
    assert [record.getMessage() for record in caplog.records] == [
        f"loading the model: {index} of 6 layers" for index in (1, 3, 5)
    ]
