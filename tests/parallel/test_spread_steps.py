"""Several ranks give the texts of one rank in padded steps too, with and without running ahead."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from _pytest.mark import ParameterSet

from configs.load import load_config
from configs.resolve import HostConfig, HostFacts, resolve_host
from engine.completion import Completion
from engine.messages import Finished, Submit, SwapDraft, Tokens
from engine.parallel.orders import PrepareDraft, RunStep, Stop, UseDraft
from engine.request import Request
from engine.speculation.planner import FixedPlanner
from engine.step.plan import UNKNOWN
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape, chain
from server.assembly.swaps import DraftSwaps
from tests.engine.test_speculation_equality import SETTINGS, assert_same
from tests.support.drafts.scripted_proposer import CyclingPlanner
from tests.support.engines.in_process import ask
from tests.support.heads.copied_head import write_copied_head
from tests.support.heads.tiny_heads import write_tiny_head
from tests.support.machine.threads import own_torch_threads
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.ranks.thread_ranks import PADDED, Leader, Way, answer, lead

SHAPES: list[TreeShape] = [
    ROOT,
    chain(3),
    StaticShape("tree", (-1, 0, 0, 1, 1, 2)),
    DynamicShape("dynamic", 8, 3, 3),
]


@pytest.fixture(scope="module", autouse=True)
def _torch_threads() -> Iterator[None]:
    with own_torch_threads():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with four query heads and two KV heads: two ranks cut both, four ranks share KV
    heads. No number of ranks divides its vocabulary."""
    base = tmp_path_factory.mktemp("ranks")
    spec = TinyLlama(num_heads=4, num_kv_heads=2, intermediate_size=96, vocab_size=389)
    (base / "model").mkdir()
    write_copied_head(base / "eagle", write_tiny_llama(base / "model", spec))
    write_tiny_head(base / "eagle3", spec, draft_vocab=61, num_layers=1)
    return base


def configure(folder: Path, head: str | None = "eagle", *overrides: str) -> HostConfig:
    settings = [
        f"model.source={folder / 'model'}",
        f"speculation.draft={'null' if head is None else folder / head}",
        "speculation.tree=root",
        "speculation.lookup=false",
        "model.dtype=float32",
        "model.max_model_len=128",
        "kernels.backend=reference",
        "cache.num_blocks=96",
        "scheduler.max_num_seqs=6",
        "scheduler.max_num_batched_tokens=160",
        "parallel.check_every=2",
    ]
    return resolve_host(load_config(None, [*settings, *overrides]), HostFacts(1, folder))


def table() -> list[Request]:
    """A request of every kind; some share a prefix."""
    rng = random.Random(5)
    shared = rng.choices(range(3, 131), k=40)
    requests = []
    for at, (name, settings) in enumerate(SETTINGS.items()):
        prompt = [*shared, at] if at % 3 == 0 else rng.choices(range(3, 131), k=4 + 5 * at)
        requests.append(
            ask(name, prompt, **({"max_tokens": 14, "seed": 2**64 - 1 - at} | settings))
        )
    return requests


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, Completion]:
    """The texts of one rank without drafts, in exact steps."""
    return answer(configure(folder, None), Way(), table(), FixedPlanner()).texts


def check(texts: dict[str, Completion], truth: dict[str, Completion]) -> None:
    assert texts.keys() == truth.keys()
    for name, record in texts.items():
        assert_same(name, record, truth[name])


def ways() -> Iterator[ParameterSet]:
    """Every shape with each head and each way of launching, and all pairs of those two. Two ranks
    in every run; four if tests marked `parallel` run."""
    for size, marks in ((2, ()), (4, (pytest.mark.parallel,))):
        for at, shape in enumerate(SHAPES):
            for run_ahead in (False, True):
                head = ("eagle", "eagle3")[(at + run_ahead) % 2]
                name = f"{shape.name}-{head}-{size}-{'ahead' if run_ahead else 'one-by-one'}"
                yield pytest.param(shape, head, size, run_ahead, id=name, marks=marks)


@pytest.mark.parametrize(("shape", "head", "size", "run_ahead"), list(ways()))
def test_padded_steps_of_several_ranks_say_what_one_rank_says(
    folder: Path,
    truth: dict[str, Completion],
    shape: TreeShape,
    head: str,
    size: int,
    run_ahead: bool,
) -> None:
    way = Way(size, PADDED, run_ahead)
    heard = answer(configure(folder, head), way, table(), FixedPlanner(shape))
    check(heard.texts, truth)
    assert (sum(plan.ahead for plan in heard.plans) > 10) == run_ahead
    assert (heard.stats.num_drafts > 0) == (shape is not ROOT)
    if head == "eagle" and shape is not ROOT:
        assert heard.stats.num_accepted_tokens > heard.stats.num_drafts * 0.3
    assert heard.stats.num_draft_faults == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["scheduler.max_num_batched_tokens=17", "scheduler.max_num_seqs=3"],
        ["cache.num_blocks=8"],
        ["cache.num_blocks=9", "cache.prefix_caching=false", "scheduler.max_num_seqs=4"],
    ],
    ids=["chunked", "preempted", "uncached"],
)
def test_batches_and_memory_do_not_change_texts_where_ranks_run_ahead(
    folder: Path, truth: dict[str, Completion], overrides: list[str]
) -> None:
    config = configure(folder, "eagle", *overrides)
    planner = CyclingPlanner((*SHAPES, chain(1)))
    heard = answer(config, Way(2, PADDED, run_ahead=True), table(), planner, per_step=2)
    check(heard.texts, truth)
    assert any(plan.ahead for plan in heard.plans)
    if overrides[0].startswith("cache.num_blocks"):
        assert heard.stats.num_preemptions > 0


@pytest.mark.parametrize("head", ["eagle", None])
def test_drafts_found_in_the_text_are_the_same_on_ranks_that_run_ahead(
    folder: Path, truth: dict[str, Completion], head: str | None
) -> None:
    way = Way(2, PADDED, run_ahead=True, lookup=True)
    heard = answer(configure(folder, head), way, table(), FixedPlanner())
    check(heard.texts, truth)
    assert any(plan.ahead for plan in heard.plans)
    assert any(row.draft for plan in heard.plans for row in plan.rows)


def test_followers_that_run_ahead_get_nothing_but_plans(folder: Path) -> None:
    """A plan holds no token of a step in flight: every rank has drawn it itself."""
    way = Way(4, PADDED, run_ahead=True)
    heard = answer(configure(folder, None), way, table()[:4], FixedPlanner())
    one, *others = heard.orders
    assert others == [one, one]
    assert one.pop() == Stop()
    assert all(isinstance(order, RunStep) and not order.scratch for order in one)
    ahead = [plan for plan in heard.plans if plan.ahead]
    assert len(ahead) > 10
    for plan in ahead:
        assert not plan.admitted
        assert not plan.released
        for row in plan.rows:
            assert row.token_ids == (UNKNOWN,)
            assert row.next_token == UNKNOWN
            assert row.draft == ()


def test_a_head_swapped_with_a_step_in_flight_does_not_change_texts(
    folder: Path, truth: dict[str, Completion]
) -> None:

    def work(leader: Leader) -> list[bool]:
        """Swaps heads, at least four, while rows run; returns for each whether a step was in
        flight. A head may load longer than all rows run."""
        core, names = leader.core, itertools.cycle(["eagle3", None, "eagle"])
        swaps, swapped = DraftSwaps(core, leader.swapper), list[bool]()
        texts: dict[str, Completion] = {}
        while (wanted := len(swapped) < 4 or not any(swapped)) or core.has_work():
            if not core.has_work():
                if texts:
                    check(texts, truth)
                texts = {request.request_id: Completion() for request in table()}
                for request in table():
                    core.add(Submit(msgspec.structs.replace(request, max_draft_nodes=None)))
            if wanted and not swaps.busy:
                name = next(names)
                swaps.ask(SwapDraft("swap", None if name is None else str(folder / name)))
            for event in core.step():
                if isinstance(event, Tokens | Finished):
                    texts[event.request_id].take(event)
            in_flight = core._flight is not None
            answers = swaps.settle()
            assert [done.error for done in answers] == [None] * len(answers)
            swapped += [in_flight] * len(answers)
            core.audit()
        check(texts, truth)
        return swapped

    config = configure(folder, "eagle", "speculation.tree=chain3")
    way = Way(2, PADDED, run_ahead=True)
    swapped, (orders,) = lead(config, way, FixedPlanner(chain(3)), work)
    used = [at for at, order in enumerate(orders) if isinstance(order, UseDraft)]
    assert len(used) == len(swapped)
    assert all(isinstance(orders[at - 1], PrepareDraft) for at in used)
    before = [orders[at - 2] for at in used]
    assert any(isinstance(order, RunStep) and order.plan.ahead for order in before)
