"""The bundled GGUF, read by us and by transformers, is the same model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.models.checkpoint import open_checkpoint
from engine.models.gguf_file import read_gguf
from engine.models.source import BUNDLED_ALIAS, bundled_gguf, resolve_source


@pytest.mark.slow
@torch.inference_mode()
def test_our_weights_give_the_logits_of_transformers_own_gguf_loading() -> None:
    path = bundled_gguf()
    oracle = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    ids = torch.arange(100, 140).unsqueeze(0)
    expected = oracle(ids).logits
    checkpoint = open_checkpoint(resolve_source(BUNDLED_ALIAS))
    ours = dict(checkpoint.tensors())
    missing = oracle.load_state_dict(ours, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]  # tied
    assert not missing.unexpected_keys
    torch.testing.assert_close(oracle(ids).logits, expected, atol=1e-4, rtol=0)


def test_bundled_header_lists_every_tensor_inside_the_file() -> None:
    file = read_gguf(bundled_gguf())
    assert len(file.tensors) == 272
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert max(tensor.offset for tensor in file.tensors.values()) < file.size
