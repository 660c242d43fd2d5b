"""Embeddings of a running server, asked for with the OpenAI client."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.e2e.conftest import MODEL
from tests.support.servers.live_server import LiveServer

TEXTS = ["the quick brown fox", "jumps over", "the lazy dog " * 20]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_the_hidden_states_of_transformers(
    server: LiveServer, tiny_folder: Path, pooling: str
) -> None:
    oracle = LlamaForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, trust_remote_code=False)
    plain = {"pooling": pooling, "add_special_tokens": False}
    found = server.client().embeddings.create(model=MODEL, input=TEXTS, extra_body=plain)
    for text, item in zip(TEXTS, found.data, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            states = oracle(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        state = (states[-1] if pooling == "last" else states.mean(0)).numpy()
        np.testing.assert_allclose(item.embedding, state / np.linalg.norm(state), atol=1e-5)
    short = server.client().embeddings.create(
        model=MODEL, input=TEXTS, dimensions=8, encoding_format="float", extra_body=plain
    )
    cut = np.array(found.data[0].embedding)[:8]
    np.testing.assert_allclose(short.data[0].embedding, cut / np.linalg.norm(cut), atol=1e-5)
    assert short.usage.prompt_tokens == found.usage.prompt_tokens > 0
