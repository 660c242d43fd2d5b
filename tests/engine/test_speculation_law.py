"""Sampled decoding with trees follows the exact distribution of the model; a broken walk does not.

Seeds are fixed, so a test either always passes or never does.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.speculation.planner import FixedPlanner
from engine.speculation.verify import walk
from engine.step.shape import chain
from engine.step.tree import DraftTree, VerifyResult
from kernels.ops import Ops
from server.assembly.drafting import Drafting
from tests.engine.sampling.test_law import chi_square, critical
from tests.support.drafts.scripted_proposer import ScriptedProposer, wide_shape
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.extended import diagonal

VOCAB = 11
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NUM_SEEDS = 2000
LENGTH = 3  # tokens of a text that are counted
TREE = wide_shape(4, 3, 1)

Text = tuple[int, ...]


@pytest.fixture(scope="module")
def small(native_ops: Ops) -> TinyEngine:
    return TinyEngine(
        random_llama(vocab_size=VOCAB),
        native_ops,
        num_blocks=64,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        max_model_len=16,
    )


@torch.inference_mode()
def exact_law(model: LlamaForCausalLM, temperature: float) -> dict[Text, float]:
    """Probability of every text of `LENGTH` tokens after the prompt."""
    law: dict[Text, float] = {(): 1.0}
    for _ in range(LENGTH):
        logits = model(torch.tensor([PROMPT + list(text) for text in law])).logits[:, -1]
        shares = (logits.double() / temperature).softmax(dim=1).tolist()
        law = {
            (*text, token): mass * share
            for (text, mass), row in zip(law.items(), shares, strict=True)
            for token, share in enumerate(row)
        }
    return law


def texts(engine: TinyEngine, temperature: float, shape: object = TREE) -> list[Text]:
    proposer = ScriptedProposer({}, 0.0, VOCAB, engine.max_model_len)
    core = replace(engine, drafting=Drafting(proposer, FixedPlanner(shape))).build()  # type: ignore[arg-type]
    requests = [
        ask(str(seed), PROMPT, temperature=temperature, seed=seed, ignore_eos=True, max_tokens=5)
        for seed in range(NUM_SEEDS)
    ]
    heard = generate(core, requests)
    assert core.stats().accepted_per_position[1] > NUM_SEEDS / 50
    return [tuple(record.token_ids[:LENGTH]) for record in heard.values()]


def excess(seen: list[Text], law: dict[Text, float]) -> float:
    """Chi-square value divided by the critical one; rare texts are counted together."""
    counts = Counter(seen)
    likely = {text: mass * len(seen) for text, mass in law.items() if mass * len(seen) > 5}
    cells = [(float(counts[text]), expected) for text, expected in likely.items()]
    cells.append((len(seen) - sum(c for c, _ in cells), len(seen) - sum(likely.values())))
    assert min(expected for _, expected in cells) > 5
    assert len(cells) > 20
    return chi_square(cells) / critical(len(cells) - 1)


@pytest.mark.parametrize(
    ("shape", "temperature"),
    diagonal([TREE, chain(3)], [0.7, 1.5], lambda one: getattr(one, "name", one)),
)
def test_the_first_tokens_follow_the_exact_law(
    small: TinyEngine, shape: object, temperature: float
) -> None:
    assert excess(texts(small, temperature, shape), exact_law(small.oracle, temperature)) < 1


def first_child(tree: DraftTree, drawn: Tensor, ops: Ops) -> VerifyResult:
    """A broken walk: accepts the first proposed child."""
    changed = drawn.clone()
    for row, node in itertools.product(range(len(drawn)), range(drawn.shape[1])):
        children = (tree.parents[row] == node).nonzero()[:, 0]
        if len(children):
            changed[row, node] = tree.tokens[row, children[0]]
    return walk(tree, changed, ops)


def near_miss(tree: DraftTree, drawn: Tensor, ops: Ops) -> VerifyResult:
    """A broken walk: prefers a child whose token id is one above the drawn one."""
    changed = drawn.clone()
    for row, node in itertools.product(range(len(drawn)), range(drawn.shape[1])):
        children = tree.tokens[row, tree.parents[row] == node]
        if bool((children == drawn[row, node] + 1).any()):
            changed[row, node] += 1
    return walk(tree, changed, ops)


@pytest.mark.parametrize(
    "broken", [first_child, pytest.param(near_miss, marks=pytest.mark.extended)]
)
def test_a_broken_walk_is_noticed(
    small: TinyEngine, monkeypatch: pytest.MonkeyPatch, broken: object
) -> None:
    monkeypatch.setattr("engine.runner.step.walk", broken)
    assert excess(texts(small, 1.5), exact_law(small.oracle, 1.5)) > 1.2
