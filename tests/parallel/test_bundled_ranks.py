"""`make serve ARGS="parallel.tensor=3 model.dtype=float32"`: the bundled model on three ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints.source import BUNDLED_ALIAS
from tests.support.servers.live_server import LiveServer
from tests.support.waiting import DEADLINE

QUESTIONS = (
    "What is the capital of France?",
    "Count from one to ten in words.",
    "Why is the sky blue? Answer in one sentence.",
)


def answers(native_cache: Path, *overrides: str) -> tuple[list[str], dict[str, float], str]:
    """Greedy answers to every question, with the metrics and the log."""
    common: dict[str, Any] = {"model": BUNDLED_ALIAS, "temperature": 0, "max_tokens": 32}
    with LiveServer(
        "model.dtype=float32",
        "model.input_bits=16",  # sums in another order round to other codes of 8 bits
        "cache.num_blocks=512",
        f"files.dir={native_cache}",
        *overrides,
        config="smollm2",
    ) as server:
        chat = server.client().chat.completions
        found = [
            chat.create(messages=[{"role": "user", "content": text}], **common)
            for text in QUESTIONS
        ]
        metrics, log = server.metrics(), server.log.text()
        assert server.stop() == 0
    return [str(answer.choices[0].message.content) for answer in found], metrics, log


@pytest.mark.parallel
def test_three_ranks_answer_as_one_does(native_cache: Path) -> None:
    alone, _, log = answers(native_cache, "speculation.draft=null")
    assert "ranks" not in log
    three = ("parallel.tensor=3", f"parallel.timeout={DEADLINE}", "parallel.check_every=10")
    together, metrics, log = answers(native_cache, *three, "speculation.tree=chain3")
    assert "3 ranks over gloo" in log
    assert "Paris" in alone[0]
    assert together == alone
    assert metrics["spec_decode_num_accepted_tokens_total"] > 20
