"""Swapping the draft head of a running engine: the text stays, and a bad head changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.load import load_config
from configs.resolve import HostFacts, resolve_host
from configs.schema import Config
from engine.completion import Completion
from engine.core import EngineCore
from engine.messages import DraftSwapped, EngineStats, Finished, Submit, SwapDraft, Tokens
from engine.request import Request
from engine.speculation.costs import StepCosts
from kernels.native.ops import NativeOps
from server.assembly import drafting
from server.assembly.compose import Engine, build_engine, build_swappable_engine
from server.assembly.drafting import Drafting
from server.assembly.swaps import DraftSwapper, DraftSwaps
from tests.support.engines.fake_executor import FakeEngine
from tests.support.engines.in_process import ask, generate, settled
from tests.support.engines.scripted_engine import INFO
from tests.support.heads.tiny_heads import write_tiny_head
from tests.support.machine.threads import own_torch_threads
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.waiting import DEADLINE, wait_until

SHARED = [7 + 3 * i % 300 for i in range(40)]
PROMPTS = {
    "greedy": ([5, 77, 300, 41, 8], {"temperature": 0.0}),
    "sampled": ([9, 9, 250], {"temperature": 1.0, "seed": 11}),
    "penalised": ([300, 2, 17], {"temperature": 0.8, "seed": 5, "frequency_penalty": 1.0}),
    "shared-greedy": (SHARED, {"temperature": 0.0}),
    "shared-sampled": ([*SHARED, 4], {"temperature": 1.0, "seed": 3}),
    "long": (SHARED * 4, {"temperature": 1.0, "seed": 8}),
}


@dataclass(frozen=True)
class Folders:
    model: Path
    first: Path
    second: Path  # more layers, another draft vocabulary


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    with own_torch_threads():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    base = tmp_path_factory.mktemp("swaps")
    (base / "model").mkdir()
    write_tiny_llama(base / "model")
    return Folders(
        base / "model",
        write_tiny_head(base / "first"),
        write_tiny_head(base / "second", draft_vocab=97, num_layers=2, seed=2),
    )


def configure(folders: Folders, cache: Path, *overrides: str) -> Config:
    settings = [
        f"model.source={folders.model}",
        "model.dtype=float32",
        "cache.num_blocks=96",
        "scheduler.max_num_batched_tokens=128",
        "speculation.lookup=false",  # these tests are about drafts of the head
        *overrides,
    ]
    return resolve_host(load_config(None, settings), HostFacts(2, cache))


def requests(suffix: str = "") -> list[Request]:
    fixed = {"max_tokens": 40, "ignore_eos": True}
    return [ask(name + suffix, ids, **(fixed | more)) for name, (ids, more) in PROMPTS.items()]


@pytest.fixture(scope="module")
def truth(folders: Folders, native_cache: Path) -> dict[str, list[int]]:
    """The texts of the requests without a draft head."""
    with own_torch_threads():
        core = build_engine(configure(folders, native_cache))
        return {name: heard.token_ids for name, heard in generate(core, requests()).items()}


def ask_for(engine: Engine, swaps: DraftSwaps, path: Path | str | None) -> DraftSwapped:
    """Request a swap while nothing runs."""
    swaps.ask(SwapDraft("swap", None if path is None else str(path)))
    return settled(swaps)[0]


class Script:
    """Runs requests with planned swaps: which head to request before which step."""

    def __init__(self, engine: Engine) -> None:
        self.core = engine.core
        self.swaps = DraftSwaps(engine.core, engine.swapper)
        self.answers: list[DraftSwapped] = []

    def run(self, asked: list[Request], plan: dict[int, Path | None]) -> dict[str, list[int]]:
        heard = {request.request_id: Completion() for request in asked}
        for request in asked:
            self.core.add(Submit(request))
        step = 0
        while self.core.has_work():
            if step in plan:
                path = plan[step]
                self.swaps.ask(SwapDraft(f"at-{step}", None if path is None else str(path)))
                self.answers += settled(self.swaps)
            for event in self.core.step():
                if isinstance(event, Tokens | Finished):
                    heard[event.request_id].take(event)
            self.core.audit()
            step += 1
        assert step > max(plan, default=-1), "a swap was planned after the end"
        return {name: record.token_ids for name, record in heard.items()}


def drafted(core: EngineCore) -> int:
    stats = core.stats()
    assert isinstance(stats, EngineStats)
    return stats.num_draft_tokens


@pytest.mark.parametrize("tree", ["chain3", "tree8", "dynamic8", "auto"])
def test_swaps_between_steps_do_not_show(
    folders: Folders, native_cache: Path, truth: dict[str, list[int]], tree: str
) -> None:
    overrides = (f"speculation.draft={folders.first}", f"speculation.tree={tree}")
    script = Script(build_swappable_engine(configure(folders, native_cache, *overrides)))
    plan = {3: folders.second, 7: None, 11: folders.first, 15: folders.second}
    assert script.run(requests(), plan) == truth
    assert [answer.error for answer in script.answers] == [None] * 4
    paths = [answer.draft and answer.draft.path for answer in script.answers]
    assert paths == [path and str(path) for path in plan.values()]


def test_swaps_at_every_step_of_an_engine_short_of_blocks_do_not_show(
    folders: Folders, native_cache: Path, truth: dict[str, list[int]]
) -> None:
    overrides = (
        f"speculation.draft={folders.first}",
        "speculation.tree=tree8",
        "cache.num_blocks=15",
        "scheduler.max_num_seqs=5",
        "scheduler.max_num_batched_tokens=37",
    )
    engine = build_swappable_engine(configure(folders, native_cache, *overrides))
    heads = itertools.cycle([folders.second, None, folders.first, None, folders.second])
    assert Script(engine).run(requests(), dict(enumerate(itertools.islice(heads, 40)))) == truth
    stats = engine.core.stats()
    assert stats.num_preemptions > 0
    assert stats.num_draft_tokens > 0
    assert not stats.draft_failed


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, uninitialised memory holds NaN."""
    empty = torch.empty

    def poisoned(*shape: object, **options: object) -> torch.Tensor:
        made = empty(*shape, **options)  # type: ignore[call-overload]
        assert isinstance(made, torch.Tensor)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def test_prefixes_cached_under_another_head_are_kept_and_spoil_nothing(
    folders: Folders,
    native_cache: Path,
    truth: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = (f"speculation.draft={folders.first}", "speculation.tree=chain3")
    engine = build_swappable_engine(configure(folders, native_cache, *overrides))
    script = Script(engine)
    script.run(requests(), {})
    hits, before = engine.core.stats().prefix_hits, drafted(engine.core)
    poison(monkeypatch)
    assert script.run(requests(), {0: folders.second}) == truth
    assert engine.core.stats().prefix_hits - hits >= len(SHARED) * 4 // 16 * 16 - 1
    assert drafted(engine.core) > before
    assert not engine.core.stats().draft_failed
    assert engine.core.stats().num_draft_faults == 0, "entries never made read as numbers"


def test_an_engine_that_began_without_a_head_drafts_with_one(
    folders: Folders,
    native_cache: Path,
    truth: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`auto` first measures, with one made-up step per real step."""
    # Whether a tiny head pays depends on the machine; here drafts cost nothing.
    monkeypatch.setattr(StepCosts, "of", lambda _, work: 1.0)
    engine = build_swappable_engine(
        configure(folders, native_cache, "speculation.candidates=[chain1]")
    )
    script = Script(engine)
    assert script.run(requests(), {2: folders.first}) == truth
    # The head may load so fast that all is measured by now.
    assert drafted(engine.core) == 0 or engine.core._measuring is None
    for again in range(5):
        heard = script.run(requests(f"-{again}"), {})
        assert list(heard.values()) == list(truth.values())
    assert drafted(engine.core) > 0


def test_without_a_head_nothing_is_drafted_any_more(
    folders: Folders, native_cache: Path, truth: dict[str, list[int]]
) -> None:
    overrides = (f"speculation.draft={folders.first}", "speculation.tree=chain3")
    engine = build_swappable_engine(configure(folders, native_cache, *overrides))
    script = Script(engine)
    assert script.run(requests(), {0: None}) == truth
    assert drafted(engine.core) == 0
    assert script.run(requests("-again"), {0: folders.second}).keys()
    assert drafted(engine.core) > 0
    assert engine.core.info.draft is not None
    assert engine.core.info.draft.path == str(folders.second)


def test_facts_of_a_head_are_told(folders: Folders, native_cache: Path) -> None:
    engine = build_swappable_engine(
        configure(folders, native_cache, f"speculation.draft={folders.first}")
    )
    assert engine.core.info.draft is not None
    assert engine.core.info.draft.draft_vocab_size == 200
    draft = ask_for(engine, DraftSwaps(engine.core, engine.swapper), folders.second).draft
    assert draft is not None
    assert (draft.kind, draft.num_layers, draft.draft_vocab_size) == ("eagle3", 2, 97)
    assert draft.tap_layers == (0, 1)
    stored = load_file(folders.second / "model.safetensors")
    counted = {name: t.numel() for name, t in stored.items() if name not in ("d2t", "t2d")}
    assert draft.num_parameters == sum(counted.values())


def break_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors")


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def rename_layers(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"model_type": "mamba"}))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (break_tensor, r"tensor fc\.weight has shape \[63, 128\]"),
        (drop_tensor, r"missing tensor norm\.weight, of shape \[64\]"),
        (truncate, r"model\.safetensors is damaged or truncated"),
        (rename_layers, r"config\.json: model_type 'mamba' is not supported"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json"),
    ],
)
def test_a_bad_head_is_named_and_the_old_one_stays(
    folders: Folders,
    native_cache: Path,
    tmp_path: Path,
    truth: dict[str, list[int]],
    spoil: object,
    reason: str,
) -> None:
    bad = write_tiny_head(tmp_path / "bad")
    spoil(bad)  # type: ignore[operator]
    overrides = (f"speculation.draft={folders.first}", "speculation.tree=chain3")
    engine = build_swappable_engine(configure(folders, native_cache, *overrides))
    script = Script(engine)
    assert script.run(requests(), {2: bad}) == truth
    (answer,) = script.answers
    assert answer.error is not None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(answer.error)
    assert answer.draft is not None
    assert answer.draft.path == str(folders.first)
    assert drafted(engine.core) > 0


def test_a_head_for_another_target_or_of_no_directory_is_refused(
    folders: Folders, native_cache: Path, tmp_path: Path
) -> None:
    engine = build_swappable_engine(configure(folders, native_cache))
    swaps = DraftSwaps(engine.core, engine.swapper)
    other = write_tiny_head(tmp_path / "other", TinyLlama(hidden_size=96))
    error = ask_for(engine, swaps, other).error
    assert error is not None
    assert "the head is for a target of hidden_size 96, this one has 64" in error
    assert "no draft head at" in (ask_for(engine, swaps, tmp_path / "none").error or "")
    assert engine.core.info.draft is None


def test_a_head_that_does_not_fit_into_memory_is_refused(
    folders: Folders, native_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_swappable_engine(configure(folders, native_cache))
    pages = 96 * 2 * 1 * 16 * 2 * 64 * 4
    draft = engine.swapper.load(str(folders.first))
    assert draft is not None
    needed = pages + draft[0].facts.num_parameters * 4
    monkeypatch.setattr(drafting, "free_bytes", lambda device: needed)
    assert engine.swapper.load(str(folders.first)) is not None
    monkeypatch.setattr(drafting, "free_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match=f"{pages} for its entries in 96 cache blocks"):
        engine.swapper.load(str(folders.first))


SMALL = 3  # tokens of a draft vocabulary


@pytest.mark.parametrize(
    ("override", "explanation"),
    [
        ("speculation.tree=dynamic8", r"speculation\.tree names 'dynamic8', .* up to 4 children"),
        ("speculation.tree=tree16", r"speculation\.tree names 'tree16', .* up to 4 children"),
        ("speculation.candidates=[chain1, tree16]", r"speculation\.candidates names 'tree16'"),
    ],
)
def test_a_draft_vocabulary_narrower_than_the_tree_is_refused_at_start_and_later(
    folders: Folders, native_cache: Path, tmp_path: Path, override: str, explanation: str
) -> None:
    narrow = write_tiny_head(tmp_path / "narrow", draft_vocab=SMALL)
    explanation += rf".*{narrow} has {SMALL} tokens"
    with pytest.raises(ValueError, match=explanation):
        build_engine(configure(folders, native_cache, f"speculation.draft={narrow}", override))
    first = f"speculation.draft={folders.first}"
    engine = build_swappable_engine(configure(folders, native_cache, first, override))
    with pytest.raises(ValueError, match=explanation):
        engine.swapper.load(str(narrow))


def test_swaps_are_done_in_the_order_in_which_they_are_asked_for(
    folders: Folders, native_cache: Path
) -> None:
    engine = build_swappable_engine(configure(folders, native_cache))
    swaps = DraftSwaps(engine.core, engine.swapper)
    for number, path in enumerate([folders.first, folders.second, None, folders.model]):
        swaps.ask(SwapDraft(str(number), None if path is None else str(path)))
    answers = [answer for _ in range(4) for answer in settled(swaps)]
    assert [answer.request_id for answer in answers] == ["0", "1", "2", "3"]
    assert [answer.error is None for answer in answers] == [True, True, True, False]
    assert not swaps.busy
    assert engine.core.info.draft is None


def test_loading_shares_no_thread_pool_with_the_steps(
    folders: Folders, native_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native operations of one pool must not run at the same time."""
    used: set[tuple[int, str]] = set()
    for name in ("pack_linear", "embedding", "linear", "attention"):
        original = getattr(NativeOps, name)

        def noted(self: NativeOps, *args: object, _original: Any = original) -> object:
            used.add((self.library.pool, threading.current_thread().name))
            return _original(self, *args)

        monkeypatch.setattr(NativeOps, name, noted)
    overrides = (f"speculation.draft={folders.first}", "kernels.backend=native")
    script = Script(build_swappable_engine(configure(folders, native_cache, *overrides)))
    script.run(requests(), {2: folders.second})
    main = threading.main_thread().name
    pools = [{pool for pool, thread in used if (thread == main) == at} for at in (True, False)]
    assert [len(group) for group in pools] == [1, 1]
    assert pools[0].isdisjoint(pools[1])


class HeldSwapper(DraftSwapper):
    """Loads only when the test lets it."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.num_dropped = 0
        self.swapped = 0

    def load(self, path: str | None) -> None:
        assert self.released.wait(DEADLINE)

    def drop(self) -> None:
        self.num_dropped += 1

    def prepare_swap(self, loaded: object) -> Generator[None, None, Drafting]:
        yield
        return Drafting()

    def swap(self, loaded: object, drafting: Drafting) -> None:
        self.swapped += 1


def test_a_head_that_does_not_load_in_time_is_given_up_and_later_ones_wait_for_its_thread() -> None:
    fake, swapper, now = FakeEngine(), HeldSwapper(), 0.0
    core = EngineCore(fake.scheduler, fake.executor, INFO)
    swaps = DraftSwaps(core, swapper, timeout=5.0, clock=lambda: now)
    swaps.ask(SwapDraft("slow", "/never"))
    assert swaps.settle() == []
    now = 4.9
    assert swaps.settle() == []
    now = 5.1
    (answer,) = swaps.settle()
    assert answer.request_id == "slow"
    assert answer.error == "it did not load within 5 s (speculation.load_timeout)"
    assert not swaps.busy
    swaps.ask(SwapDraft("next", None))
    (answer,) = swaps.settle()
    assert answer.error == "an earlier head, which was given up, is still being loaded"
    swapper.released.set()

    def dropped() -> int:
        assert swaps.settle() == []
        return swapper.num_dropped

    wait_until(dropped)
    swaps.ask(SwapDraft("last", None))
    assert settled(swaps) == [DraftSwapped("last")]
    assert (swapper.num_dropped, swapper.swapped) == (1, 1)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_head_with_a_pipe_for_a_file_is_refused_at_once(
    folders: Folders, native_cache: Path, tmp_path: Path, name: str
) -> None:
    head = tmp_path / "head"
    shutil.copytree(folders.first, head)
    (head / name).unlink()
    os.mkfifo(head / name)
    engine = build_swappable_engine(configure(folders, native_cache))
    answer = ask_for(engine, DraftSwaps(engine.core, engine.swapper), head)
    assert answer.error is not None
    assert f"{name} is a pipe, not a regular file" in answer.error
