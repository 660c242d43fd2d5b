"""Several ranks give the tokens of one rank, for all kinds of requests and settings."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from transformers import LlamaForCausalLM

from engine.completion import Completion
from engine.messages import Abort, Submit, SwapDraft
from engine.request import Request
from engine.speculation.planner import FixedPlanner
from engine.step.shape import ROOT, DynamicShape, chain
from server.assembly.swaps import DraftSwaps
from tests.engine.test_speculation_equality import SETTINGS, assert_same
from tests.support.drafts.scripted_proposer import CyclingPlanner, wide_shape
from tests.support.engines.in_process import ask, generate, settled
from tests.support.heads.copied_head import write_copied_head
from tests.support.heads.tiny_heads import write_tiny_head
from tests.support.machine.threads import own_torch_threads
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.ranks.processes import Ranks, started

VOCAB = 389  # a prime: no number of ranks divides it
TREE, DYNAMIC = wide_shape(3, 2, 1), DynamicShape("dynamic9", 9, 3, 4)
MIXED = (chain(3), ROOT, TREE, DYNAMIC, chain(1))
# number of ranks -> heads and KV heads: split, split unevenly in bytes, each KV head held twice
HEADS = {2: (4, 2), 3: (6, 3), 4: (8, 2)}


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 131), k=length)


SHARED = prompt(40, seed=99)


def table() -> list[Request]:
    """A request of every kind; some share a prefix."""
    requests = []
    for at, (name, settings) in enumerate(SETTINGS.items()):
        ids = prompt(5 + 6 * at, at) if at % 3 else SHARED + prompt(at, at)
        requests.append(ask(name, ids, **({"max_tokens": 14, "seed": 2**64 - 1 - at} | settings)))
    return requests


def growing() -> list[Request]:
    """Requests that need few blocks at first and many at the end."""
    return [
        ask(f"long-{n}", prompt(10, n), max_tokens=50, temperature=1.0, seed=n, ignore_eos=True)
        for n in range(4)
    ]


@dataclass(frozen=True)
class Group:
    """Several ranks, and the texts of one rank."""

    ranks: Ranks
    truth: dict[str, Completion]
    heads: dict[str, Path]

    def check(self, heard: dict[str, Completion]) -> None:
        for name, record in heard.items():
            assert_same(name, record, self.truth[name])

    def swap(self, name: str | None) -> None:
        """Swap the draft head and wait until the new one is in use."""
        core = self.ranks.engine.core
        if core.info.draft is None and name is None:
            return
        swaps = DraftSwaps(core, self.ranks.engine.swapper)
        swaps.ask(SwapDraft("swap", None if name is None else str(self.heads[name])))
        answer = settled(swaps)[0]
        assert answer.error is None, answer.error


@dataclass(frozen=True)
class Made:
    model: Path
    oracle: LlamaForCausalLM
    heads: dict[str, Path]


def make(base: Path, size: int) -> Made:
    heads, kv_heads = HEADS[size]
    spec = TinyLlama(
        vocab_size=VOCAB,
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=96,
        head_dim=32,
        hidden_size=96,
    )
    (base / "model").mkdir()
    oracle = write_tiny_llama(base / "model", spec)
    return Made(
        base / "model",
        oracle,
        {
            "eagle3": write_tiny_head(base / "eagle3", spec, draft_vocab=101),
            "eagle": write_copied_head(base / "eagle", oracle),
        },
    )


@pytest.fixture(scope="module", autouse=True)
def _torch_threads() -> Iterator[None]:
    with own_torch_threads():
        yield


SIZES = [2, *(pytest.param(size, marks=pytest.mark.parallel) for size in (3, 4))]


@pytest.fixture(scope="module", params=SIZES)
def group(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    native_cache: Path,
) -> Iterator[Group]:
    """Two ranks in every run; three and four if tests marked `parallel` run."""
    size = request.param
    made = make(tmp_path_factory.mktemp(f"ranks-{size}"), size)
    with started(made.model, native_cache, "speculation.draft=null") as one, one.core() as core:
        truth = generate(core, table() + growing())
    replicated = "speculation.draft_parallel=" + ("replicated" if size == 3 else "sharded")
    head = f"speculation.draft={made.heads['eagle']}"
    with started(made.model, native_cache, head, replicated, f"parallel.tensor={size}") as ranks:
        yield Group(ranks, truth, made.heads)


PLANNERS = {
    "plain": lambda: FixedPlanner(ROOT),
    "chain": lambda: FixedPlanner(chain(3)),
    "tree": lambda: FixedPlanner(TREE),
    "dynamic": lambda: FixedPlanner(DYNAMIC),
    "mixed": lambda: CyclingPlanner(MIXED),
}


@pytest.mark.parametrize("name", PLANNERS)
def test_any_tree_gives_the_text_of_one_rank(group: Group, name: str) -> None:
    group.swap("eagle")
    with group.ranks.core(PLANNERS[name]()) as core:
        group.check(generate(core, table()))
        stats = core.stats()
    assert (stats.num_drafts > 0) == (name != "plain")
    if name != "plain":
        assert stats.num_accepted_tokens > stats.num_drafts * 0.3
    assert stats.num_draft_faults == 0


@pytest.mark.parametrize("head", ["eagle", "eagle3", None])
def test_any_head_gives_the_text_of_one_rank(group: Group, head: str | None) -> None:
    group.swap(head)
    with group.ranks.core(CyclingPlanner(MIXED) if head else None) as core:
        group.check(generate(core, table()))
        assert (core.stats().num_drafts > 0) == (head is not None)


@pytest.mark.parametrize("head", ["eagle", None])
def test_drafts_found_in_the_text_are_the_same_on_all_ranks(group: Group, head: str | None) -> None:
    group.swap(head)
    with group.ranks.core(CyclingPlanner(MIXED if head else (ROOT,)), lookup=True) as core:
        group.check(generate(core, table()))
        assert head is not None or core.stats().steps_by_tree["lookup"] > 0


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_batched_tokens": 17},
        {"max_num_batched_tokens": 5, "max_num_seqs": 2},
        {"max_num_seqs": 3, "prefix_caching": False},
    ],
    ids=["chunks-of-17", "chunks-of-5", "three-rows-no-prefix-cache"],
)
def test_chunks_and_batches_do_not_change_texts(group: Group, limits: dict[str, int]) -> None:
    group.swap("eagle")
    with group.ranks.core(CyclingPlanner(MIXED), **limits) as core:
        group.check(generate(core, table(), per_step=2))


def test_preempted_rows_come_back_with_their_text(group: Group) -> None:
    group.swap("eagle")
    with group.ranks.core(FixedPlanner(chain(3)), num_blocks=11) as core:
        group.check(generate(core, growing()))
        assert core.stats().num_preemptions > 0
        assert core.stats().num_accepted_tokens > 0


def test_what_is_found_in_the_prefix_cache_serves_all_ranks(group: Group) -> None:
    group.swap("eagle")
    with group.ranks.core(FixedPlanner(chain(3))) as core:
        generate(core, table())
        group.check(generate(core, table()))
        assert core.stats().prefix_hits > 300


def test_aborted_neighbours_do_not_change_texts(group: Group) -> None:
    group.swap("eagle")
    names = [request.request_id for request in table()]
    kept, gone = {name: Completion() for name in names[::2]}, iter(names[1::2])
    with group.ranks.core(CyclingPlanner(MIXED)) as core:
        for request in table():
            core.add(Submit(request))
        while core.has_work():
            for event in core.step()[:-1]:
                if event.request_id in kept:  # type: ignore[union-attr]
                    kept[event.request_id].take(event)  # type: ignore[union-attr, arg-type]
            core.add(Abort(next(gone, "none")))
            core.audit()
    group.check(kept)


def test_few_rows_leave_ranks_without_any_to_sample(group: Group) -> None:
    with group.ranks.core() as core:
        for request in table()[:3]:
            group.check(generate(core, [request]))


def test_a_head_swapped_while_rows_run_does_not_change_texts(group: Group) -> None:
    """Uses the engine's own core, which plans for the new head after the swap."""
    group.swap(None)
    core, swapper = group.ranks.engine.core, group.ranks.engine.swapper
    heard: dict[str, Completion] = {}
    swaps, paths = DraftSwaps(core, swapper), ["eagle", "eagle3", "none", "eagle"]
    answers = []
    while paths or swaps.busy or core.has_work():
        if not core.has_work():  # a head may load longer than all rows run
            group.check(heard)
            heard = {request.request_id: Completion() for request in table()}
            for request in table():
                core.add(Submit(msgspec.structs.replace(request, max_draft_nodes=None)))
        if not swaps.busy and paths:
            path = group.heads.get(paths.pop(0))
            swaps.ask(SwapDraft("swap", None if path is None else str(path)))
        for event in core.step()[:-1]:
            heard[event.request_id].take(event)  # type: ignore[union-attr, arg-type]
        answers += swaps.settle()
        core.audit()
    group.check(heard)
    assert len(answers) == 4
    assert {answer.error for answer in answers} == {None}
    core.step()
