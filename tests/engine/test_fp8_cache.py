"""The bundled model with keys and values in FP8: as good as with bfloat16, and no text depends on
drafts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import TEXT, WINDOW, cut, load, measures, scores
from configs.load import load_config
from engine.speculation.planner import FixedPlanner
from server.assembly.drafting import tree_shape
from server.assembly.offline import OfflineEngine
from server.text.chat_codec import load_codec
from tests.support.configurations import hosted
from tests.support.engines.in_process import ask
from tests.support.machine.threads import own_torch_threads


@pytest.fixture(scope="module")
def settings(native_cache: Path) -> Iterator[list[str]]:
    with own_torch_threads():
        yield [f"files.dir={native_cache}", "cache.num_blocks=128", "kernels.threads=2"]


@pytest.fixture(scope="module")
def ids(settings: list[str]) -> list[int]:
    """A text that the model has not seen."""
    tokenizer = load_codec(hosted(load_config(None, settings))).tokenizer
    return tokenizer.encode(TEXT.read_text(encoding="utf-8"), False)


def test_perplexity_is_within_one_per_cent_of_bfloat16(settings: list[str], ids: list[int]) -> None:
    found = []
    for dtype in ("auto", "fp8"):
        target = load(hosted(load_config(None, [*settings, f"cache.dtype={dtype}"])), WINDOW)
        sums = torch.zeros(3, dtype=torch.float64)
        for window in cut(ids, WINDOW)[:3]:
            own = scores(target, window)
            sums += measures(own, own, window)
        found.append(math.exp(sums[0].item() / (3 * WINDOW // 2)))
    plain, small = found
    assert plain != small
    assert small == pytest.approx(plain, rel=0.01)


def test_no_text_depends_on_drafts(settings: list[str], ids: list[int]) -> None:
    given = [*settings, "cache.dtype=fp8", "speculation.tree=root"]
    engine = OfflineEngine.from_config(load_config(None, given))
    assert engine.core.info.cache_dtype == "fp8"
    texts = []
    for tree in ("root", "chain3", "tree8"):
        engine.core.draft_with(replace(engine.core.policy, planner=FixedPlanner(tree_shape(tree))))
        requests = [
            ask(f"{tree}-{heat}", ids[:40], max_tokens=48, temperature=heat, seed=3)
            for heat in (0.0, 1.0)
        ]
        done = engine.generate(requests)
        texts.append([done[request.request_id].token_ids for request in requests])
    assert texts[0] == texts[1] == texts[2]
    assert engine.core.stats().num_accepted_tokens > 20
