"""Swapping the draft head of several ranks: all of them use the new one, or none does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.completion import Completion
from engine.messages import DraftSwapped, Submit, SwapDraft
from server.assembly.swaps import DraftSwaps
from tests.support.engines.in_process import ask, generate, settled
from tests.support.heads.copied_head import write_copied_head
from tests.support.heads.tiny_heads import write_tiny_head
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.ranks.processes import Ranks, started
from tests.support.servers.live_server import run_aerie

pytestmark = pytest.mark.parallel
REQUESTS = [
    ask(f"r{n}", [7 * n + 3 * i % 97 + 3 for i in range(12)], max_tokens=40, ignore_eos=True)
    for n in range(3)
]


@dataclass(frozen=True)
class Group:
    """Two ranks that measure the trees of a head before they use them."""

    ranks: Ranks
    base: Path
    truth: dict[str, list[int]]

    def swap(self, path: Path) -> DraftSwapped:
        swaps = DraftSwaps(self.ranks.engine.core, self.ranks.engine.swapper)
        swaps.ask(SwapDraft("swap", str(path)))
        return settled(swaps)[0]

    def check_text(self) -> int:
        """Run the requests and check their texts; returns how many nodes were drafted."""
        core = self.ranks.engine.core
        before, heard = core.stats(), {request.request_id: Completion() for request in REQUESTS}
        for request in REQUESTS:
            core.add(Submit(request))
        while core.has_work():
            for event in core.step()[:-1]:
                heard[event.request_id].take(event)  # type: ignore[union-attr, arg-type]
        assert {name: record.token_ids for name, record in heard.items()} == self.truth
        core.step()
        return core.stats().num_draft_tokens - before.num_draft_tokens


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory, native_cache: Path) -> Iterator[Group]:
    base = tmp_path_factory.mktemp("swaps")
    (base / "model").mkdir()
    oracle = write_tiny_llama(base / "model", TinyLlama(vocab_size=389))
    with started(base / "model", native_cache, "speculation.draft=null") as one, one.core() as core:
        truth = {name: heard.token_ids for name, heard in generate(core, REQUESTS).items()}
    first = write_tiny_head(base / "first", TinyLlama(vocab_size=389), draft_vocab=101)
    write_copied_head(base / "copied", oracle)
    trees = ("speculation.tree=auto", "speculation.candidates=[chain1, chain2]")
    own = (f"speculation.draft={first}", "parallel.tensor=2")
    with started(base / "model", native_cache, *own, *trees) as ranks:
        yield Group(ranks, base, truth)


def test_ranks_measure_a_new_head_beside_their_rows(group: Group) -> None:
    assert group.swap(group.base / "copied").error is None
    while not group.check_text():
        pass  # nothing is drafted before everything is measured
    group.check_text()


def test_a_head_that_one_rank_cannot_load_is_used_by_none(group: Group) -> None:
    broken = group.base / "broken"
    shutil.copytree(group.base / "copied", broken)
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    config["intermediate_size"] += 1
    (broken / "config.json").write_text(json.dumps(config), encoding="utf-8")
    before = group.ranks.engine.core.info.draft
    answer = group.swap(broken)
    assert answer.error is not None
    assert "layers.0.mlp" in answer.error
    assert group.ranks.engine.core.info.draft == before
    group.check_text()
    assert group.swap(group.base / "first").error is None
    group.check_text()


def test_a_model_that_cannot_be_cut_is_refused_with_what_can_be(
    group: Group, native_cache: Path
) -> None:
    ended = run_aerie(
        "serve",
        "--port",
        "0",
        f"model.source={group.base / 'model'}",
        "model.dtype=float32",
        "parallel.tensor=3",
        f"files.dir={native_cache}",
    )
    assert ended.returncode == 1
    assert "parallel.tensor = 3: 4 attention heads do not divide by 3" in ended.stderr
    assert "this model allows 1, 2, 4" in ended.stderr
    assert "Traceback" not in ended.stderr
