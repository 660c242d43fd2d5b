"""A node draws with the history of its own path, as if that path had been committed."""

from __future__ import annotations

import random

import pytest
import torch

from engine.request import Request, SamplingParams
from engine.sampling.batch import draw_settings
from engine.sampling.history import TokenHistory
from engine.sampling.rows import RowState
from engine.sampling.sampler import Sampler
from engine.step.tree import DraftTree
from kernels.ops import Ops
from kernels.sampling.torch_draw import edit_logits
from tests.support.scripted_proposer import random_parents, tree_of

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


def state(at: int, output: list[int]) -> RowState:
    params = SamplingParams(**({"max_tokens": 99, "seed": 2**64 - 1 - at} | PARAMS[at]))  # type: ignore[arg-type]
    request = Request(request_id=str(at), prompt_ids=[1, 3, 3, at], params=params)
    return RowState.admit(request, output)


def path_to(node: int, parents: list[int], tokens: list[int]) -> list[int]:
    found = []
    while node > 0:
        found.append(tokens[node])
        node = parents[node]
    return found[::-1]


@pytest.mark.parametrize("seed", range(5))
def test_all_nodes_at_once_equal_each_node_alone(reference_ops: Ops, seed: int) -> None:
    rng = random.Random(seed)
    outputs = [rng.choices(range(VOCAB), k=rng.randint(0, 4)) for _ in PARAMS]
    trees = []
    for _ in PARAMS:
        parents = random_parents(rng.choice([1, 3, 9, 20]), rng, 4)
        trees.append((parents, rng.choices(range(VOCAB), k=len(parents))))
    rows = [state(at, output) for at, output in enumerate(outputs)]
    together = draw_settings(rows, tree_of(trees), [EOS], VOCAB)
    alone = [
        state(at, outputs[at] + path_to(node, parents, tokens))
        for at, (parents, tokens) in enumerate(trees)
        for node in range(len(parents))
    ]
    roots = DraftTree.roots(torch.zeros(len(alone), dtype=torch.int64))
    each = draw_settings(alone, roots, [EOS], VOCAB)
    for part in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions"):
        assert torch.equal(getattr(together, part), getattr(each, part)), part
    logits = torch.randn(len(alone), VOCAB, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(edit_logits(logits, together), edit_logits(logits, each))
    sampler = Sampler(reference_ops)
    assert torch.equal(sampler.draw(logits, together), sampler.draw(logits, each))


@pytest.mark.parametrize(
    "path", [[], [5], [5, 5], [8], [8, 8, 9], [1, 8, 5, 1, 8], list(range(40))], ids=str
)
def test_a_history_along_a_path_is_the_history_after_it(path: list[int]) -> None:
    history, after = TokenHistory([5, 1, 5], [6, 1]), TokenHistory([5, 1, 5], [6, 1, *path])
    before = dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True))
    ids, counts = history.along(path)
    assert len(set(ids.tolist())) == len(ids)
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == dict(
        zip(after.ids.tolist(), after.counts.tolist(), strict=True)
    )
    assert before == dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True))
