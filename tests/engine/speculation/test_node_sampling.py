"""A node draws with the history of its own path, as if that path had been committed."""

from __future__ import annotations

import random

import pytest
import torch

from engine.request import Request, SamplingParams
from kernels.ops import Ops
from tests.support.drafts.scripted_proposer import random_parents
from tests.support.engines.told_target import Text, sample

VOCAB, EOS = 12, 2
PARAMS: list[dict[str, object]] = [
    {},
    {"temperature": 0.0},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.6, "presence_penalty": -0.4},
    {"frequency_penalty": 1.1, "temperature": 0.0, "logit_bias": {3: 2.0, 5: -1.0}},
    {"min_tokens": 5, "stop_token_ids": (4, 7)},
    {"min_tokens": 7, "presence_penalty": 0.5, "top_k": 4},
    {"top_p": 0.7, "min_p": 0.05, "logit_bias": {EOS: 3.0}, "temperature": 1.6},
]


def request(at: int) -> Request:
    params = SamplingParams(**({"max_tokens": 99, "seed": 2**64 - 1 - at} | PARAMS[at]))  # type: ignore[arg-type]
    return Request(request_id=str(at), prompt_ids=[1, 3, 3, at], params=params)


def path_to(node: int, parents: list[int], tokens: list[int]) -> list[int]:
    found = []
    while node > 0:
        found.append(tokens[node])
        node = parents[node]
    return found[::-1]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "padded"])
@pytest.mark.parametrize("seed", range(5))
def test_all_nodes_at_once_equal_each_node_alone(
    reference_ops: Ops, seed: int, exact: bool
) -> None:
    rng = random.Random(seed)
    outputs = [rng.choices(range(VOCAB), k=rng.randint(0, 4)) for _ in PARAMS]
    trees = []
    for _ in PARAMS:
        parents = random_parents(rng.choice([1, 3, 9, 20]), rng, 4)
        trees.append((parents, rng.choices(range(VOCAB), k=len(parents))))
    whole = [Text(request(at), outputs[at], tree) for at, tree in enumerate(trees)]
    single = [
        Text(request(at), outputs[at] + path_to(node, parents, tokens))
        for at, (parents, tokens) in enumerate(trees)
        for node in range(len(parents))
    ]
    logits = torch.randn(len(single), VOCAB, generator=torch.Generator().manual_seed(seed))
    together = sample(reference_ops, whole, logits, eos=[EOS], exact=exact)
    alone = sample(reference_ops, single, logits, eos=[EOS])
    assert together.settings is not None
    assert alone.settings is not None
    for part in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions"):
        found = getattr(together.settings, part)[: len(single)]
        assert torch.equal(found, getattr(alone.settings, part)), part
    assert torch.equal(together.after_edits, alone.after_edits)
    assert together.drawn == alone.drawn
