"""The engine in this process: answers chats as transformers does, and refuses bad requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from configs.load import load_config
from engine.checkpoints.source import ModelFiles
from engine.messages import EngineStats, Finished, Tokens
from engine.request import FinishReason
from server.assembly.offline import OfflineEngine
from server.text.template.chat_template import ChatTemplate
from server.text.tokens.tokenizer_files import load_tokenizer
from tests.support.engines.in_process import ask
from tests.support.machine.threads import own_torch_threads
from tests.support.models.greedy import greedy_margins
from tests.support.models.tiny_llama import write_tiny_llama

VOCAB = 384
NEAR_TIE = 1e-4
CHATS = (
    "the quick brown fox",
    "a server answers many clients",
    "def main():",
    "jumps over the lazy dog " * 8,
    "?",
    "and never loses a token",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> LlamaForCausalLM:
    return write_tiny_llama(folder)


@pytest.fixture(scope="module")
def engine(folder: Path, oracle: LlamaForCausalLM, native_cache: Path) -> Iterator[OfflineEngine]:
    settings = [
        f"model.source={folder}",
        "model.dtype=float32",
        "cache.num_blocks=128",
        "kernels.threads=2",
        f"files.dir={native_cache}",
    ]
    with own_torch_threads():
        yield OfflineEngine.from_config(load_config(None, settings))


@pytest.fixture(scope="module")
def prompts(folder: Path, oracle: LlamaForCausalLM) -> list[list[int]]:
    tokenizer = load_tokenizer(ModelFiles("hf", folder, "tiny"), folder, None)
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    return [
        tokenizer.encode_rendered(template.render([{"role": "user", "content": text}]))
        for text in CHATS
    ]


def test_chats_get_the_greedy_answers_of_transformers(
    engine: OfflineEngine, oracle: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    requests = [ask(str(n), ids, max_tokens=24) for n, ids in enumerate(prompts)]
    heard = engine.generate(requests)
    assert list(heard) == [request.request_id for request in requests]
    for request in requests:
        got, length = heard[request.request_id].token_ids, len(request.prompt_ids)
        ids = torch.tensor([request.prompt_ids])
        expected = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
        )
        assert got == expected[0, length:].tolist()
        assert greedy_margins(oracle, request.prompt_ids, got).min() > NEAR_TIE


def test_every_request_ends_once_and_every_step_tells_its_stats(engine: OfflineEngine) -> None:
    requests = [ask(f"r{n}", [5, 6, 7 + n], max_tokens=n, ignore_eos=True) for n in range(5)]
    steps = list(engine.steps(requests))
    assert all(isinstance(events[-1], EngineStats) for events in steps)
    events = [event for step in steps for event in step[:-1]]
    ended = [event.request_id for event in events if isinstance(event, Finished)]
    assert sorted(ended) == [f"r{n}" for n in range(5)]
    emitted = {f"r{n}": 0 for n in range(5)}
    for event in events:
        if isinstance(event, Tokens):
            emitted[event.request_id] += len(event.token_ids)
    assert emitted == {f"r{n}": n for n in range(5)}
    assert not engine.core.has_work()


def test_without_requests_nothing_happens(engine: OfflineEngine) -> None:
    assert engine.generate([]) == {}
    assert list(engine.steps([])) == []


def test_info_describes_the_engine(engine: OfflineEngine) -> None:
    assert engine.info == engine.core.info
    assert engine.info.vocab_size == VOCAB


UNKNOWN_IDS: list[tuple[str, list[int], dict[str, object]]] = [
    ("prompt_ids has token id 384", [5, VOCAB], {}),
    ("prompt_ids has token id -1", [-1, 5], {}),
    ("logit_bias has token id 384", [5], {"logit_bias": {7: 1.0, VOCAB: 1.0}}),
    ("logit_bias has token id -1", [5], {"logit_bias": {-1: 1.0}}),
    ("stop_token_ids has token id 384", [5], {"stop_token_ids": (7, VOCAB), "min_tokens": 2}),
    ("stop_token_ids has token id -384", [5], {"stop_token_ids": (-VOCAB,), "min_tokens": 2}),
]


@pytest.mark.parametrize(("problem", "prompt_ids", "params"), UNKNOWN_IDS)
def test_token_ids_outside_the_vocabulary_end_only_their_request(
    engine: OfflineEngine,
    prompts: list[list[int]],
    problem: str,
    prompt_ids: list[int],
    params: dict[str, object],
) -> None:
    good = ask("good", prompts[0], max_tokens=6)
    alone = engine.generate([good])["good"].token_ids
    heard = engine.generate([good, ask("bad", prompt_ids, **params)])
    assert heard["good"].token_ids == alone
    finished = heard["bad"].finished
    assert finished is not None
    assert (finished.reason, finished.num_output) == (FinishReason.ERROR, 0)
    assert finished.error == f"{problem}; ids end at {VOCAB - 1}"
    engine.core.audit()


def test_the_first_and_the_last_token_id_are_the_models(engine: OfflineEngine) -> None:
    ids = [0, VOCAB - 1]
    request = ask(
        "edge", ids, logit_bias=dict.fromkeys(ids, 1.0), stop_token_ids=tuple(ids), min_tokens=3
    )
    finished = engine.generate([request])["edge"].finished
    assert finished is not None
    assert finished.reason in (FinishReason.STOP, FinishReason.LENGTH)


def test_a_prompt_longer_than_the_context_ends_only_its_request(engine: OfflineEngine) -> None:
    heard = engine.generate([ask("long", [5] * 513), ask("good", [5], max_tokens=2)])
    finished = heard["long"].finished
    assert finished is not None
    assert finished.reason is FinishReason.ERROR
    assert "maximum context length is 512" in (finished.error or "")
    assert len(heard["good"].token_ids) > 0
