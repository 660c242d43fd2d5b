"""A real draft head in the real engine: it never changes the text, and its cache is complete."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from drafter.checkpoint import load_head, save_eagle3
from drafter.heads.building import HeadBuilder, TargetWeights
from drafter.heads.interface import DraftContext, DraftHead
from drafter.heads.untrained import eagle3_config, random_eagle3
from drafter.proposer import DraftProposer
from engine.checkpoints.arch import LlamaArch
from engine.core import EngineCore
from engine.kv.storage import KVStorage
from engine.messages import Submit
from engine.models.loading import LayerLoader
from engine.models.place import Place
from engine.request import Request
from engine.runner.measuring import StepMeter
from engine.speculation.planner import LATE_STEPS, Choice, FixedPlanner
from engine.speculation.proposer import Committed, Drafted, DraftLimits, Roots, Singles
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape, chain
from kernels.ops import Ops
from server.assembly.drafting import Drafting
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine, random_llama

CPU = torch.device("cpu")
DRAFT_IDS = torch.arange(1, 131, 2)  # every second token can be drafted
SHAPES: dict[str, TreeShape] = {
    "chain1": chain(1),
    "chain3": chain(3),
    "chain7": chain(7),
    "tree": StaticShape("tree", (-1, 0, 0, 0, 1, 1, 2, 4, 4, 7)),
    "dynamic": DynamicShape("dynamic", 12, 4, 5),
}


@pytest.fixture(scope="module")
def head(native_ops: Ops, tmp_path_factory: pytest.TempPathFactory) -> DraftHead:
    """Untrained, with weights large enough for varied drafts, over half of the vocabulary."""
    oracle = random_llama()
    target = LlamaArch.from_hf_config(oracle.config.to_dict())
    config = dataclasses.replace(eagle3_config(target, len(DRAFT_IDS)), aux_layers=(0, 1))
    folder = tmp_path_factory.mktemp("head") / "eagle3"
    tensors = random_eagle3(config, target, seed=1, std=0.3)
    save_eagle3(folder, config, target, tensors, DRAFT_IDS)
    place = Place(native_ops, torch.float32, CPU)
    blocks = LayerLoader.of(target, oracle.state_dict().__getitem__, place, 256)
    embedding = blocks.pack_padded("model.embed_tokens", target.vocab_size)
    lm_head = blocks.pack_padded("lm_head", target.vocab_size)
    return load_head(folder, HeadBuilder(TargetWeights(target, embedding, lm_head), place, 256))


@dataclass
class Watched:
    """A proposer that notes what it proposed, by seed and position of the root."""

    inner: DraftProposer
    seen: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    lookahead = 1

    @property
    def tap(self) -> object:
        return self.inner.tap

    @property
    def failed(self) -> bool:
        return self.inner.failed

    def release(self, lines: Sequence[int]) -> None:
        self.inner.release(lines)

    def admit(self, lines: Sequence[int]) -> None:
        self.inner.admit(lines)

    def take(self, committed: Committed, hidden: Tensor) -> None:
        self.inner.take(committed, hidden)

    def take_singles(self, singles: Singles, hidden: Tensor) -> None:
        self.inner.take_singles(singles, hidden)

    def draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:
        drafted = self.inner.draft(roots, shape, limits)
        tree = drafted.tree
        for row, size in enumerate(tree.sizes.tolist()):
            if size > 1:
                key = (int(roots.seeds[row]), int(roots.positions[row]))
                nodes = tree.tokens[row, :size].tolist()
                assert self.seen.setdefault(key, nodes) == nodes, "one position, two drafts"
        return drafted


def watched(head: DraftHead, ops: Ops, num_blocks: int, num_lines: int = 16) -> Watched:
    """Pages full of NaN, the scratch block too: reading an entry that was never written shows."""
    arch = head.arch
    pages = KVStorage.allocate(
        arch.num_layers, num_blocks + 1, 16, arch.num_kv_heads, arch.head_dim, torch.float32, CPU
    )
    for page in (*pages.keys, *pages.values):
        page.fill_(torch.nan)
    return Watched(DraftProposer(head, DraftContext(ops, pages), num_lines, arch.hidden_size))


def requests(tag: str = "") -> list[Request]:
    shared = [(7 * i) % 120 + 3 for i in range(40)]
    return [
        ask(f"greedy{tag}", shared[:9], max_tokens=30, seed=1, ignore_eos=True),
        ask(f"hot{tag}", shared, max_tokens=30, seed=2, temperature=1.0, ignore_eos=True),
        ask(f"long{tag}", [*shared, 5, 6, 7], max_tokens=30, seed=3, ignore_eos=True),
        ask(f"one{tag}", [11], max_tokens=30, seed=4, temperature=0.7, ignore_eos=True),
    ]


def run(
    engine: TinyEngine, watch: Watched, shape: TreeShape, **changes: int
) -> tuple[EngineCore, dict[str, list[int]]]:
    core = replace(engine, **changes, drafting=Drafting(watch, FixedPlanner(shape))).build()  # type: ignore[arg-type]
    heard = generate(core, requests(), per_step=2)
    return core, {name: record.token_ids for name, record in heard.items()}


@pytest.fixture(scope="module")
def plain(tiny_engine: TinyEngine) -> dict[str, list[int]]:
    heard = generate(tiny_engine.build(), requests())
    return {name: record.token_ids for name, record in heard.items()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_text_is_that_of_plain_decoding(
    tiny_engine: TinyEngine,
    native_ops: Ops,
    head: DraftHead,
    plain: dict[str, list[int]],
    shape: TreeShape,
) -> None:
    watch = watched(head, native_ops, tiny_engine.num_blocks)
    core, texts = run(tiny_engine, watch, shape)
    assert texts == plain
    assert core.stats().num_drafts > 20
    assert core.stats().num_draft_faults == 0
    assert set(core.stats().seconds_by_part) == {"draft", "verify", "commit"}
    assert min(core.stats().seconds_by_part.values()) > 0
    drafted = {token for nodes in watch.seen.values() for token in nodes[1:]}
    assert drafted <= set(DRAFT_IDS.tolist())


@pytest.mark.parametrize("shape", [SHAPES["tree"], SHAPES["dynamic"]], ids=["tree", "dynamic"])
def test_drafts_do_not_depend_on_the_history_of_the_cache(
    tiny_engine: TinyEngine, native_ops: Ops, head: DraftHead, shape: TreeShape
) -> None:
    """With chunked prompts, prefix hits and preemption the same position gets the same draft, so
    the head's cache equals that of one undisturbed run."""
    undisturbed = watched(head, native_ops, tiny_engine.num_blocks)
    run(tiny_engine, undisturbed, shape)
    for changes in (
        {"max_num_batched_tokens": 17, "max_num_seqs": 4},
        {"prefix_caching": False},
        {"num_blocks": 11},
    ):
        watch = watched(head, native_ops, changes.get("num_blocks", tiny_engine.num_blocks))
        watch.inner._pending.most = 1000  # rows without room for nodes pause, but give up nothing
        core, _ = run(tiny_engine, watch, shape, **changes)
        common = undisturbed.seen.keys() & watch.seen.keys()
        assert len(common) > 20, changes
        for key in common:
            short = min(len(watch.seen[key]), len(undisturbed.seen[key]))
            if isinstance(shape, StaticShape):
                assert watch.seen[key][:short] == undisturbed.seen[key][:short], (changes, key)
            elif len(watch.seen[key]) == len(undisturbed.seen[key]):
                assert watch.seen[key] == undisturbed.seen[key], (changes, key)
        if "num_blocks" in changes:
            assert core.stats().num_preemptions > 0


class Switching:
    """Alternates between some steps with the root only and some with a tree."""

    def __init__(self, shape: TreeShape) -> None:
        self._shape = shape
        self._steps = 0

    def choose(self, rows: object) -> Choice:
        self._steps += 1
        return Choice(self._shape if self._steps // 5 % 2 else ROOT)

    def observe(self, plan: object, outcome: object, seconds: float | None) -> None:
        """The switches are forced."""


def test_after_a_pause_drafts_are_what_they_would_have_been(
    tiny_engine: TinyEngine, native_ops: Ops, head: DraftHead, plain: dict[str, list[int]]
) -> None:
    always = watched(head, native_ops, tiny_engine.num_blocks)
    run(tiny_engine, always, SHAPES["chain3"])
    watch = watched(head, native_ops, tiny_engine.num_blocks)
    drafting = Drafting(watch, Switching(SHAPES["chain3"]))
    core = replace(tiny_engine, drafting=drafting).build()
    heard = generate(core, requests(), per_step=2)
    assert {name: record.token_ids for name, record in heard.items()} == plain
    common = always.seen.keys() & watch.seen.keys()
    assert len(common) > 10
    assert all(always.seen[key] == watch.seen[key] for key in common)


def test_a_warm_prefix_cache_costs_at_most_one_token_per_request(
    tiny_engine: TinyEngine, native_ops: Ops, head: DraftHead
) -> None:
    cached = []
    for drafting in (
        None,
        Drafting(watched(head, native_ops, tiny_engine.num_blocks), FixedPlanner(chain(3))),  # type: ignore[arg-type]
    ):
        core = replace(tiny_engine, drafting=drafting).build()
        generate(core, requests())
        heard = generate(core, requests("2"))
        cached.append({name: record.finished.num_cached for name, record in heard.items()})  # type: ignore[union-attr]
    for name, plain_hits in cached[0].items():
        assert plain_hits - 1 <= cached[1][name] <= plain_hits


def test_a_head_that_returns_nan_costs_speed_only(
    tiny_engine: TinyEngine,
    native_ops: Ops,
    head: DraftHead,
    plain: dict[str, list[int]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = watched(head, native_ops, tiny_engine.num_blocks)
    forward = type(head).forward

    def broken(self: DraftHead, *args: object) -> Tensor:
        return torch.full_like(forward(self, *args), torch.nan)  # type: ignore[arg-type]

    monkeypatch.setattr(type(head), "forward", broken)
    with caplog.at_level(logging.WARNING):
        core, texts = run(tiny_engine, watch, SHAPES["chain3"])
    assert texts == plain
    assert core.stats().num_drafts == 0
    assert core.stats().num_draft_faults > 0
    assert not core.stats().draft_failed
    assert len([r for r in caplog.records if "not finite" in r.message]) == 1


@pytest.mark.parametrize("calls", [0, 1, 7])
def test_a_head_that_raises_is_dropped_and_the_text_goes_on(
    tiny_engine: TinyEngine,
    native_ops: Ops,
    head: DraftHead,
    plain: dict[str, list[int]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    calls: int,
) -> None:
    """From its first call, in the middle of a tree, or later."""
    watch = watched(head, native_ops, tiny_engine.num_blocks)
    forward, seen = type(head).forward, []

    def failing(self: DraftHead, *args: object) -> Tensor:
        seen.append(1)
        if len(seen) > calls:
            raise RuntimeError("out of memory")
        return forward(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(type(head), "forward", failing)
    with caplog.at_level(logging.ERROR):
        core, texts = run(tiny_engine, watch, SHAPES["tree"])
    assert texts == plain
    assert core.stats().draft_failed
    assert len(seen) == calls + 1
    assert len([r for r in caplog.records if "draft head failed" in r.message]) == 1


def test_a_window_keeps_the_text_and_goes_on_drafting(
    tiny_engine: TinyEngine, native_ops: Ops, head: DraftHead, plain: dict[str, list[int]]
) -> None:
    whole = watched(head, native_ops, tiny_engine.num_blocks)
    run(tiny_engine, whole, SHAPES["chain3"])
    watch = watched(head, native_ops, tiny_engine.num_blocks)
    watch.inner._window = 8
    core, texts = run(tiny_engine, watch, SHAPES["chain3"])
    assert texts == plain
    assert core.stats().num_drafts > 20
    assert core.stats().num_draft_faults == 0, "no entry was looked at that was never made"
    far = [key for key in whole.seen.keys() & watch.seen.keys() if key[1] > 20]
    assert any(whole.seen[key] != watch.seen[key] for key in far)


def pages_of(watch: Watched) -> Tensor:
    kv = watch.inner._ctx.kv
    return torch.stack((*kv.keys, *kv.values))


class Pausing(Switching):
    """Drafts in few steps, far apart."""

    def choose(self, rows: object) -> Choice:
        self._steps += 1
        return Choice(self._shape if self._steps % 9 > 6 else ROOT)


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_num_batched_tokens": 17, "max_num_seqs": 4}, {"num_blocks": 11}],
    ids=["easy", "chunked", "preempted"],
)
def test_no_entry_is_attended_to_that_was_never_made_or_is_of_another_token(
    tiny_engine: TinyEngine,
    native_ops: Ops,
    head: DraftHead,
    changes: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pages are NaN wherever there should be no entry: at first, and when a slot gets a token."""
    watch = watched(head, native_ops, changes.get("num_blocks", tiny_engine.num_blocks))
    inner, follow = watch.inner, watch.inner._note_tokens

    def poisoning(committed: Committed, counts: Sequence[int]) -> None:
        follow(committed, counts)
        for page in (*inner._ctx.kv.keys, *inner._ctx.kv.values):
            page.flatten(0, 1)[committed.slots] = torch.nan

    monkeypatch.setattr(inner, "_note_tokens", poisoning)
    watch.seen = Forgetful()  # how much of its text the head sees depends on what was before
    inner._pending.most = 3
    inner._num_drafting = 0.0
    drafting = Drafting(watch, Pausing(SHAPES["chain3"]))
    core = replace(tiny_engine, **changes, drafting=drafting).build()  # type: ignore[arg-type]
    heard = generate(core, [*requests(), *requests("2")], per_step=1)
    assert core.stats().num_draft_faults == 0
    assert core.stats().num_drafts > 20
    assert any(record.finished and record.finished.num_cached for record in heard.values())
    assert int(inner._firsts.max()) > 20, "some rows begin late"


@pytest.mark.parametrize("drafts", [True, False])
def test_a_prefix_hit_is_attended_to_if_it_was_decoded_with_drafts(
    tiny_engine: TinyEngine, native_ops: Ops, head: DraftHead, drafts: bool
) -> None:
    watch = watched(head, native_ops, tiny_engine.num_blocks)
    shape = chain(3) if drafts else ROOT
    core = replace(tiny_engine, drafting=Drafting(watch, FixedPlanner(shape))).build()  # type: ignore[arg-type]
    first = ask("first", [9, 8, 7], max_tokens=60, ignore_eos=True)
    text = [9, 8, 7, *generate(core, [first])["first"].token_ids][:50]
    core.draft_with(replace(core.policy, planner=FixedPlanner(chain(3))))
    asked = ask("second", [*text, 5], max_tokens=20, ignore_eos=True, seed=5)
    heard = generate(core, [asked])["second"]
    fresh = watched(head, native_ops, tiny_engine.num_blocks)
    alone = replace(tiny_engine, drafting=Drafting(fresh, FixedPlanner(chain(3)))).build()  # type: ignore[arg-type]
    assert heard.token_ids == generate(alone, [asked])["second"].token_ids
    assert heard.finished is not None
    assert heard.finished.num_cached == 47
    assert core.stats().num_draft_faults == 0
    common = {key for key in watch.seen.keys() & fresh.seen.keys() if key[0] == 5}
    assert len(common) > 5
    if drafts:
        assert all(watch.seen[key] == fresh.seen[key] for key in common)
    assert int(watch.inner._firsts.max()) == (1 if drafts else 48)


@pytest.fixture
def taken(head: DraftHead, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each forward of the head has, from now on."""
    forward, found = type(head).forward, []

    def counting(self: DraftHead, features: Tensor, *args: object) -> Tensor:
        found.append(len(features))
        return forward(self, features, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(type(head), "forward", counting)
    return found


def test_tokens_of_rows_that_do_not_draft_cost_nothing(
    tiny_engine: TinyEngine, native_ops: Ops, head: DraftHead, taken: list[int]
) -> None:
    watch = watched(head, native_ops, tiny_engine.num_blocks)
    core = replace(tiny_engine, drafting=Drafting(watch, FixedPlanner(ROOT))).build()  # type: ignore[arg-type]
    generate(core, [ask("a", [3, 4, 5, 6], max_tokens=100, ignore_eos=True)])
    assert taken == [4], "a prompt might be followed by drafts"
    generate(core, [ask("b", [7, 8, 9, 6], max_tokens=9, ignore_eos=True)])
    assert taken == [4], "but drafts are no longer likely"


@pytest.mark.parametrize(("pause", "late"), [(4, 4), (70, LATE_STEPS)])
def test_a_row_that_drafts_again_brings_its_newest_tokens_with_it(
    tiny_engine: TinyEngine,
    native_ops: Ops,
    head: DraftHead,
    taken: list[int],
    pause: int,
    late: int,
) -> None:
    watch = watched(head, native_ops, tiny_engine.num_blocks)
    core = replace(tiny_engine, drafting=Drafting(watch, FixedPlanner(chain(1)))).build()  # type: ignore[arg-type]
    core.add(Submit(ask("a", [3, 4, 5, 6], max_tokens=120, ignore_eos=True)))
    for planner, num_steps in ((chain(1), 4), (ROOT, pause), (chain(1), 1)):
        core.draft_with(replace(core.policy, planner=FixedPlanner(planner)))
        taken.clear()
        for _ in range(num_steps):
            core.step()
    assert taken[0] == late
    assert core.stats().num_draft_faults == 0


def test_a_head_outlives_a_prompt_that_ends_at_the_last_position(
    tiny_engine: TinyEngine, native_ops: Ops, head: DraftHead
) -> None:
    """The last chunk is one token, alone in its step, and there is no place for what follows."""
    watch = watched(head, native_ops, tiny_engine.num_blocks)
    changes = {"max_model_len": 33, "max_num_batched_tokens": 32}
    drafting = Drafting(watch, FixedPlanner(chain(3)))
    core = replace(tiny_engine, **changes, drafting=drafting).build()  # type: ignore[arg-type]
    generate(core, [ask("full", [3 + at for at in range(33)], max_tokens=0)])
    assert not core.stats().draft_failed
    heard = generate(core, [ask("next", [3, 4, 5], max_tokens=20, ignore_eos=True)])
    assert len(heard["next"].token_ids) == 20
    assert core.stats().num_drafts > 0


def drafted_at(
    watch: Watched,
    core: EngineCore,
    line: int,
    position: int,
    *,
    max_nodes: int = 4,
    shape: TreeShape = SHAPES["chain3"],
    exact: bool = True,
) -> Drafted:
    """What the head would grow on a line's state for a root at `position`."""
    tables = core._executor._body.state.tables  # type: ignore[attr-defined]
    roots = Roots(
        lines=torch.tensor([line]),
        tokens=torch.tensor([5]),
        positions=torch.tensor([position]),
        max_nodes=torch.tensor([max_nodes]),
        block_tables=tables[line : line + 1],
        temperatures=torch.zeros(1),
        seeds=torch.zeros(1, dtype=torch.int64),
        top_k=torch.full((1,), 10**6),
        top_p=torch.ones(1),
        min_p=torch.zeros(1),
    )
    limits = DraftLimits(
        exact=exact, any_sampled=False, is_filtered=False, max_context=64, max_len=256
    )
    with torch.inference_mode():
        return watch.inner.draft(roots, shape, limits)


def sizes_at(watch: Watched, core: EngineCore, line: int, position: int) -> list[int]:
    return drafted_at(watch, core, line, position).tree.sizes.tolist()


def after_four_steps(watch: Watched, engine: TinyEngine) -> tuple[EngineCore, int, int]:
    """An engine with one request at work, its line, and the position of its next root."""
    core = replace(engine, drafting=Drafting(watch, FixedPlanner(chain(3)))).build()  # type: ignore[arg-type]
    core.add(Submit(ask("a", [3, 4, 5, 6], max_tokens=60, ignore_eos=True)))
    for _ in range(4):
        core.step()
    line = int(watch.inner._positions.argmax())
    newest = int(watch.inner._positions[line])
    assert newest > 4
    return core, line, newest


def test_a_tree_grows_from_the_state_of_its_very_root_and_of_no_other(
    tiny_engine: TinyEngine, native_ops: Ops, head: DraftHead
) -> None:
    watch = watched(head, native_ops, tiny_engine.num_blocks)
    core, line, newest = after_four_steps(watch, tiny_engine)
    assert sizes_at(watch, core, line, newest) == [4]
    assert sizes_at(watch, core, line, newest - 1) == [1]
    assert sizes_at(watch, core, line, newest + 1) == [1]
    watch.inner.admit([line])
    assert sizes_at(watch, core, line, newest) == [1], "another sequence's state"


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "padded"])
def test_a_fault_is_a_tree_that_was_wanted_and_could_not_grow(
    tiny_engine: TinyEngine, native_ops: Ops, head: DraftHead, exact: bool
) -> None:
    watch = watched(head, native_ops, tiny_engine.num_blocks)
    core, line, newest = after_four_steps(watch, tiny_engine)
    assert drafted_at(watch, core, line, newest, exact=exact).faults.tolist() == [False]
    watch.inner._states[line] = torch.nan
    faulty = drafted_at(watch, core, line, newest, exact=exact)
    assert faulty.faults.tolist() == [True]
    assert faulty.tree.sizes.tolist() == [1]
    for position, max_nodes in ((newest, 1), (newest + 1, 4)):
        unwanted = drafted_at(watch, core, line, position, max_nodes=max_nodes, exact=exact)
        assert unwanted.faults.tolist() == [False]
        assert unwanted.tree.sizes.tolist() == [1]


@pytest.mark.parametrize("max_nodes", [0, 1])
def test_a_row_without_a_tree_writes_nothing_where_its_nodes_would_lie(
    tiny_engine: TinyEngine, native_ops: Ops, head: DraftHead, max_nodes: int
) -> None:
    """Padded steps grow trees for all rows, also for those that have no slots for nodes."""
    watch = watched(head, native_ops, tiny_engine.num_blocks)
    core, line, newest = after_four_steps(watch, tiny_engine)
    for shape in (SHAPES["chain3"], SHAPES["tree"], SHAPES["dynamic"]):
        before = pages_of(watch).nan_to_num(nan=1e9)
        found = drafted_at(watch, core, line, newest, max_nodes=max_nodes, shape=shape, exact=False)
        assert found.tree.sizes.tolist() == [max_nodes]
        after = pages_of(watch).nan_to_num(nan=1e9)
        assert torch.equal(before[:, :-1], after[:, :-1])
        assert not torch.equal(before[:, -1], after[:, -1]), "scratch"


def test_a_head_outlives_steps_that_are_measured_again_and_again(
    tiny_engine: TinyEngine, native_ops: Ops, head: DraftHead
) -> None:
    """One position, many times, with a tree and without."""
    watch = watched(head, native_ops, tiny_engine.num_blocks)
    core = replace(tiny_engine, drafting=Drafting(watch, FixedPlanner(chain(3)))).build()  # type: ignore[arg-type]
    watch.seen = Forgetful()
    measuring = StepMeter(core._executor, tiny_engine.num_blocks, 16, 2, 64, 256)
    costs = measuring.measure([ROOT, chain(3)])
    assert costs.num_observed >= 2
    assert not watch.failed
    heard = generate(core, [ask("a", [3, 4, 5], max_tokens=9, ignore_eos=True)])
    assert len(heard["a"].token_ids) == 9
    assert core.stats().num_drafts > 0


class Forgetful(dict[tuple[int, int], list[int]]):
    """Compares no drafts: measured rows are no texts."""

    def setdefault(self, key: tuple[int, int], default: list[int]) -> list[int]:
        return default
