"""The bundled model, through the whole engine, gives the text of transformers on its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.peers.transformers_generate import load_oracle
from configs.load import load_config
from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.source import BUNDLED_ALIAS, resolve_source
from engine.completion import Completion
from engine.request import FinishReason
from kernels.ops import Ops
from server.assembly.offline import OfflineEngine
from server.text.template.chat_template import ChatTemplate
from server.text.tokens.tokenizer import Tokenizer
from server.text.tokens.tokenizer_files import load_tokenizer
from tests.support.engines.in_process import ask, generate
from tests.support.machine.threads import own_torch_threads
from tests.support.models.greedy import greedy_margins
from tests.support.models.packed import BLOCK, load_packed, whole

pytestmark = pytest.mark.slow

# Largest allowed difference of logits (which reach 38 here) to transformers in float64, due to
# float32. Measured: transformers in float32 0.9e-4, reference 0.8e-4, native 1e-4.
TOLERANCE = 1.5e-4
NEAR_TIE = 1e-3  # if the two best logits are closer than this, either token is right
NUM_TOKENS = 64
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "List five fruits.",
    "How do I boil an egg?",
    "Write a Python function that reverses a string.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "Give me three tips for sleeping better.",
    "Who wrote Romeo and Juliet?",
    "What is 12 times 12? Think step by step.",
    "Tell me a short story about a dragon who is afraid of fire.",
    "Was ist die Hauptstadt von Österreich?",
)
TEXTS = (
    "Once upon a time",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4, 5, 6, 7,",
    "The theory of relativity, published by Albert Einstein in 1915, states that",
    "Paris",
    '{"name": "Ada", "age": 36, "languages": [',
)


@pytest.fixture(scope="module")
def arch_and_weights() -> tuple[LlamaArch, dict[str, Tensor]]:
    checkpoint = open_checkpoint(resolve_source(BUNDLED_ALIAS))
    return checkpoint.arch, dict(checkpoint.tensors())


@pytest.fixture(scope="module")
def oracle() -> LlamaForCausalLM:
    return load_oracle(open_checkpoint(resolve_source(BUNDLED_ALIAS)), torch.float32)


@pytest.fixture(scope="module")
def exact_oracle() -> LlamaForCausalLM:
    return load_oracle(open_checkpoint(resolve_source(BUNDLED_ALIAS)), torch.float64)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Conversations in the model's chat template, and plain texts."""
    files = resolve_source(BUNDLED_ALIAS)
    tokenizer: Tokenizer = load_tokenizer(files, tmp_path_factory.mktemp("tokenizer"), None)
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    chats = [template.render([{"role": "user", "content": text}]).text for text in QUESTIONS]
    return [tokenizer.encode(text, add_special_tokens=False) for text in (*chats, *TEXTS)]


@pytest.fixture
def greedy_texts(native_cache: Path, prompts: list[list[int]]) -> list[Completion]:
    """All prompts in one batch, through the engine that `aerie serve` builds."""
    settings = [
        "model.dtype=float32",
        "model.max_model_len=512",
        "cache.num_blocks=320",
        "kernels.threads=2",
        f"files.dir={native_cache}",
    ]
    requests = [
        ask(str(number), ids, max_tokens=NUM_TOKENS, ignore_eos=True)
        for number, ids in enumerate(prompts)
    ]
    with own_torch_threads():
        engine = OfflineEngine.from_config(load_config(Path("smollm2-fp32"), settings))
        heard = generate(engine.core, requests)
    return [heard[request.request_id] for request in requests]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_logits_equal_those_of_transformers(
    request: pytest.FixtureRequest,
    arch_and_weights: tuple[LlamaArch, dict[str, Tensor]],
    exact_oracle: LlamaForCausalLM,
    prompts: list[list[int]],
    backend: str,
) -> None:
    ops: Ops = request.getfixturevalue(f"{backend}_ops")
    arch, weights = arch_and_weights
    packed = load_packed(arch, weights.__getitem__, ops, torch.float32)
    rows, first = [], 0
    for number in (1, 13, 14, 16):
        ids = prompts[number]
        end = first + -(-len(ids) // BLOCK)
        rows.append(whole(len(rows), ids, range(first, end)))
        first = end
    for row, got in zip(rows, packed.run(*rows), strict=True):
        with torch.inference_mode():
            expected = exact_oracle(torch.tensor([row.token_ids])).logits[0].float()
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.extended  # transformers generates for a minute
def test_greedy_texts_of_one_batch_equal_those_of_transformers(
    oracle: LlamaForCausalLM, prompts: list[list[int]], greedy_texts: list[Completion]
) -> None:
    assert len(prompts) == 20
    for number, (ids, completion) in enumerate(zip(prompts, greedy_texts, strict=True)):
        assert completion.finished is not None
        assert completion.finished.reason is FinishReason.LENGTH
        assert len(completion.token_ids) == NUM_TOKENS
        margins = greedy_margins(oracle, ids, completion.token_ids)
        assert margins.min() > NEAR_TIE, (number, int(margins.argmin()), float(margins.min()))
