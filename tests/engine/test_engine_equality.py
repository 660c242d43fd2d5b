"""The text of a request depends only on model, prompt, parameters and seed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from engine.completion import Completion
from engine.request import Request
from kernels.sampling.settings import DrawSettings
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine

VOCAB = 131


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=length)


def requests() -> list[Request]:
    """Greedy, sampled and penalised requests of many lengths, two of them with a shared prefix."""
    shared = prompt(40, seed=99)
    return [
        ask("greedy", prompt(5, 1), max_tokens=24),
        ask("hot", prompt(33, 2), temperature=1.5, seed=1, max_tokens=24),
        ask("filtered", prompt(64, 3), temperature=0.8, top_k=20, top_p=0.9, seed=2, max_tokens=24),
        ask("min-p", prompt(17, 4), temperature=1.0, min_p=0.1, seed=3, max_tokens=24),
        ask(
            "penalised",
            shared + prompt(7, 5),
            temperature=0.7,
            seed=2**64 - 1,
            presence_penalty=1.0,
            frequency_penalty=0.5,
            repetition_penalty=1.3,
            max_tokens=24,
        ),
        ask(
            "biased",
            shared + prompt(9, 6),
            temperature=1.0,
            seed=5,
            logit_bias={7: 4.0},
            max_tokens=24,
        ),
        ask("scored", prompt(50, 7), temperature=1.0, seed=6, logprobs=3, max_tokens=24),
    ]


def tokens_of(heard: dict[str, Completion]) -> dict[str, list[int]]:
    return {request_id: record.token_ids for request_id, record in heard.items()}


@pytest.fixture(scope="module")
def alone(tiny_engine: TinyEngine) -> dict[str, list[int]]:
    """Each request alone on a fresh engine with room for everything."""
    texts = {}
    for request in requests():
        texts |= tokens_of(generate(tiny_engine.build(), [request]))
    return texts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prefix_caching": False},
        {"max_num_batched_tokens": 8, "max_num_seqs": 8},
        {"max_num_batched_tokens": 17, "max_num_seqs": 3},
        {"num_blocks": 12},
        {"num_blocks": 9, "max_num_batched_tokens": 11, "max_num_seqs": 7},
    ],
    ids=["together", "no-prefix-cache", "chunks-of-8", "odd-chunks", "preempted", "squeezed"],
)
def test_a_request_gives_the_same_tokens_in_any_company(
    tiny_engine: TinyEngine, alone: dict[str, list[int]], changes: dict[str, int]
) -> None:
    engine = replace(tiny_engine, **changes).build()
    assert tokens_of(generate(engine, requests(), per_step=2)) == alone


@pytest.mark.parametrize("budget", [1, 2, 15, 16, 33, 64])
def test_prompt_chunking_does_not_change_texts(
    tiny_engine: TinyEngine, alone: dict[str, list[int]], budget: int
) -> None:
    engine = replace(tiny_engine, max_num_batched_tokens=budget, max_num_seqs=1).build()
    assert tokens_of(generate(engine, requests())) == alone


def test_the_squeezed_engine_really_preempts(tiny_engine: TinyEngine) -> None:
    engine = replace(tiny_engine, num_blocks=12).build()
    heard = generate(engine, requests())
    assert sum(record.finished.num_preemptions for record in heard.values()) > 0  # type: ignore[union-attr]


def test_a_warm_prefix_cache_gives_the_same_tokens_and_says_so(
    tiny_engine: TinyEngine, alone: dict[str, list[int]]
) -> None:
    engine = tiny_engine.build()
    generate(engine, requests())
    again = [
        Request(**{**as_dict(request), "request_id": f"{request.request_id}2"})
        for request in requests()
    ]
    heard = generate(engine, again)
    assert {name.removesuffix("2"): tokens for name, tokens in tokens_of(heard).items()} == alone
    assert heard["filtered2"].finished.num_cached == 48  # type: ignore[union-attr]


def as_dict(request: Request) -> dict[str, object]:
    return {name: getattr(request, name) for name in request.__struct_fields__}


def test_seeds_matter_and_greedy_ignores_them(tiny_engine: TinyEngine) -> None:
    ids = prompt(12, 8)
    hot = [ask(f"h{seed}", ids, temperature=1.0, seed=seed) for seed in range(6)]
    cold = [ask(f"c{seed}", ids, temperature=0.0, seed=seed) for seed in range(6)]
    texts = tokens_of(generate(tiny_engine.build(), [*hot, *cold]))
    assert len({tuple(texts[f"h{seed}"]) for seed in range(6)}) == 6
    assert len({tuple(texts[f"c{seed}"]) for seed in range(6)}) == 1


@torch.inference_mode()
def test_the_noise_of_a_token_is_that_of_its_own_position(tiny_engine: TinyEngine) -> None:
    """Drafts are ranked with it before the target draws."""
    asked = ask("hot", prompt(13, 9), temperature=1.3, seed=4, max_tokens=8, ignore_eos=True)
    text = generate(tiny_engine.build(), [asked])["hot"].token_ids
    tokens = asked.prompt_ids + text
    logits = tiny_engine.oracle(torch.tensor([tokens])).logits[0, 12:-1].float()
    drawn = tiny_engine.ops.draw(
        logits,
        DrawSettings(
            temperature=torch.full((8,), 1.3),
            seeds=torch.full((8,), 4),
            positions=torch.arange(13, 21),
            top_k=None,
            top_p=None,
            min_p=None,
            any_sampled=True,
            any_greedy=False,
        ),
    )
    assert drawn.tolist() == text
