"""Final hidden states of prompts: those of transformers, whatever else the engine does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.completion import Completion
from engine.request import FinishReason
from kernels.ops import Ops
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine, random_llama

PROMPTS = [[(7 * i) % 120 + 3 for i in range(length)] for length in (1, 5, 40, 100, 100)]
WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "padded": {"padded": True},
    "ahead": {"padded": True, "run_ahead": True},
    "short of blocks": {"num_blocks": 18, "max_num_batched_tokens": 20},
}


@pytest.fixture(scope="module")
def engine(native_ops: Ops) -> TinyEngine:
    return TinyEngine(random_llama(), native_ops, max_model_len=128)


def pooled(found: Completion) -> np.ndarray:
    assert found.pooled is not None
    assert found.token_ids == []
    assert found.finished is not None
    assert (found.finished.reason, found.finished.num_output) == (FinishReason.STOP, 0)
    return np.frombuffer(found.pooled, np.float32)


@pytest.mark.parametrize("way", WAYS)
def test_states_are_those_of_transformers_and_other_texts_stay(
    engine: TinyEngine, way: str
) -> None:
    """Each prompt twice, so that the second finds it in the prefix cache."""
    core = replace(engine, **WAYS[way]).build()
    asked = [
        ask(f"{pooling} {at}", prompt, max_tokens=0, pooling=pooling)
        for pooling in ("last", "mean")
        for at, prompt in enumerate(PROMPTS)
    ]
    text = ask("text", PROMPTS[2], max_tokens=20, temperature=1.0, seed=3)
    found = generate(core, [*asked, text])
    core.audit()
    for at, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            states = engine.oracle.model(torch.tensor([prompt])).last_hidden_state[0].numpy()
        for pooling, state in (("last", states[-1]), ("mean", states.mean(0))):
            mine = pooled(found[f"{pooling} {at}"])
            np.testing.assert_allclose(mine, state, rtol=1e-4, atol=1e-4, err_msg=pooling)
    alone = generate(engine.build(), [text])
    assert found["text"].token_ids == alone["text"].token_ids


def test_a_state_that_is_not_finite_is_an_error(native_ops: Ops) -> None:
    oracle = random_llama()
    with torch.no_grad():
        oracle.get_input_embeddings().weight[100] = torch.nan
    core = TinyEngine(oracle, native_ops, max_model_len=128).build()
    found = generate(
        core, [ask(kind, [5, 100, 6], max_tokens=0, pooling=kind) for kind in ("last", "mean")]
    )
    for record in found.values():
        assert record.finished is not None
        assert (record.finished.reason, record.pooled) == (FinishReason.ERROR, None)
