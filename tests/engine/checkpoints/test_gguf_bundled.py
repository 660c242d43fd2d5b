"""The bundled GGUF, read by us and by transformers, is the same model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.gguf_files.header import read_gguf
from engine.checkpoints.source import BUNDLED_ALIAS, bundled_gguf, resolve_source


@pytest.mark.extended  # transformers converts every weight
def test_every_weight_equals_transformers_own_gguf_loading() -> None:
    checkpoint = open_checkpoint(resolve_source(BUNDLED_ALIAS))
    with torch.device("meta"):
        names = LlamaForCausalLM(LlamaConfig(num_hidden_layers=checkpoint.arch.num_layers))
    loaded = load_gguf_checkpoint(str(bundled_gguf()), return_tensors=True, model_to_load=names)
    oracle = loaded["tensors"]
    ours = dict(checkpoint.tensors())
    assert ours.keys() == oracle.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, oracle[name].to(torch.float32)), name
    config = LlamaConfig(**loaded["config"])
    assert LlamaArch.from_hf_config(config.to_dict()) == checkpoint.arch


def test_bundled_header_lists_every_tensor_inside_the_file() -> None:
    file = read_gguf(bundled_gguf())
    assert len(file.tensors) == 272
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert max(tensor.offset for tensor in file.tensors.values()) < file.size
