"""Which products of a model have kernels to choose."""

from __future__ import annotations

from collections import Counter

from engine.checkpoints.families import read_text_model
from engine.models.families import load_target
from engine.models.products import products
from kernels.ops import LinearWeight, Ops
from tests.support.tiny_engine import TinyEngine, random_llama


def shape(weight: LinearWeight) -> tuple[int, int]:
    return weight.in_features, weight.out_features


def test_all_products_of_a_model_but_its_embedding_are_named(reference_ops: Ops) -> None:
    oracle = random_llama(tie_word_embeddings=False)
    arch = read_text_model(oracle.config.to_dict()).arch
    place = TinyEngine(oracle, reference_ops).place
    model = load_target(arch, oracle.state_dict().__getitem__, place, 64)
    found = Counter((shape(weight), gated) for weight, gated in products(model, None))
    assert found == {
        ((96, 640), False): 2,  # queries, keys and values
        ((384, 96), False): 2,
        ((96, 320), True): 2,
        ((160, 96), False): 2,
        ((96, 131), False): 1,  # to logits
    }
