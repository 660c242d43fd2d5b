"""Speculation never changes the text of a request: with any tree, proposer and batch.

`ScriptedProposer` asserts that every committed token reaches it exactly once, in order, with its
slot and the hidden state of the token before it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import pytest
import torch
from transformers import LlamaForCausalLM

from engine.completion import Completion
from engine.core import EngineCore
from engine.messages import Abort, Submit, TokenLogprob
from engine.request import FinishReason, Request
from engine.speculation.planner import FixedPlanner, Planner
from engine.step.shape import ROOT, TreeShape, chain
from kernels.ops import Ops
from server.assembly.drafting import Drafting
from tests.support.drafts.scripted_proposer import (
    CHAINS,
    DYNAMIC,
    TREES,
    CyclingPlanner,
    Script,
    ScriptedProposer,
    wide_shape,
)
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import EOS, TinyEngine
from tests.support.extended import diagonal

VOCAB = 131
MAX_LEN = 120  # not a multiple of the block size
BUDGET = 1100  # room for a tree of 64 nodes in each of 16 rows


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=length)


SHARED = prompt(40, seed=99)
SETTINGS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "cool": {"temperature": 0.3, "logprobs": 2},
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 1.5, "logprobs": 0, "logprob_token_ids": (7, EOS, 100)},
    "top-k": {"temperature": 1.0, "top_k": 20},
    "filtered": {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "penalised": {
        "temperature": 1.0,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.3,
        "logprobs": 3,
    },
    # Favours what was said before: one occurrence counted too many or too few shows soon.
    "greedy-repeating": {"temperature": 0.0, "frequency_penalty": -1.0, "ignore_eos": True},
    "biased": {"temperature": 1.0, "logit_bias": {7: 6.0, 9: 5.5, 11: -100.0}},
    "ends": {"temperature": 1.0, "logit_bias": {EOS: 4.0}, "min_tokens": 2},
    "ends-late": {"temperature": 1.0, "logit_bias": {EOS: 7.0, 8: 7.0}, "min_tokens": 9},
    "stops": {
        "temperature": 1.0,
        "logit_bias": {7: 4.0, 8: 5.0, 9: 5.0},
        "stop_token_ids": (7,),
        "min_tokens": 3,
    },
    "goes-on": {"temperature": 1.0, "logit_bias": {EOS: 7.0}, "ignore_eos": True},
    "echo": {"temperature": 0.7, "prompt_logprobs": 1, "logprobs": 1},
}


def table() -> list[Request]:
    """One request of every kind; several share a prefix, some limit their own trees."""
    limits = itertools.cycle([None, None, 3, None, 1, None, 0, None])
    requests = []
    for at, (name, settings) in enumerate(SETTINGS.items()):
        ids = prompt(5 + 6 * at, at) if at % 3 else SHARED + prompt(at, at)
        plain = ask(name, ids, **({"max_tokens": 20 + at % 3, "seed": 2**64 - 1 - at} | settings))
        requests.append(msgspec.structs.replace(plain, max_draft_nodes=next(limits)))
    return requests


def by_seed(requests: Sequence[Request], heard: dict[str, Completion]) -> dict[int, Script]:
    return {
        request.params.seed: Script(request.prompt_ids + heard[request.request_id].token_ids)
        for request in requests
    }


@dataclass(frozen=True)
class Truth:
    """The texts of requests without drafts."""

    engine: TinyEngine
    requests: tuple[Request, ...]
    heard: dict[str, Completion]
    scripts: dict[int, Script]

    @classmethod
    def of(cls, engine: TinyEngine, requests: Sequence[Request]) -> Truth:
        heard = generate(engine.build(), requests)
        return cls(engine, tuple(requests), heard, by_seed(requests, heard))

    def with_features(self) -> Truth:
        """Adds the hidden states of a plain forward."""
        scripts = {
            seed: Script(script.token_ids, plain_hidden(self.engine.oracle, script.token_ids))
            for seed, script in self.scripts.items()
        }
        return replace(self, scripts=scripts)

    def speculating(
        self,
        planner: Planner,
        acceptance: float = 0.7,
        *,
        whims: bool = False,
        changes: dict[str, object] | None = None,
    ) -> EngineCore:
        engine = replace(self.engine, **(changes or {}))  # type: ignore[arg-type]
        proposer = ScriptedProposer(
            self.scripts, acceptance, VOCAB, engine.max_model_len, whims=whims
        )
        return replace(engine, drafting=Drafting(proposer, planner)).build()

    def check(self, heard: dict[str, Completion]) -> None:
        for name, record in heard.items():
            assert_same(name, record, self.heard[name])


@torch.inference_mode()
def plain_hidden(oracle: LlamaForCausalLM, token_ids: Sequence[int]) -> torch.Tensor:
    return oracle.model(torch.tensor([list(token_ids)])).last_hidden_state[0]


def assert_same(name: str, seen: Completion, expected: Completion) -> None:
    assert seen.token_ids == expected.token_ids, name
    assert seen.finished is not None
    assert expected.finished is not None
    for part in ("reason", "num_prompt", "num_output"):
        assert getattr(seen.finished, part) == getattr(expected.finished, part), name
    assert_same_scores(seen.logprobs, expected.logprobs)
    assert_same_scores(seen.prompt_logprobs, expected.prompt_logprobs)


def assert_same_scores(
    seen: Sequence[TokenLogprob | None], expected: Sequence[TokenLogprob | None]
) -> None:
    assert len(seen) == len(expected)
    for entry, other in zip(seen, expected, strict=True):
        if entry is None or other is None:
            assert entry is other
            continue
        assert entry.token_id == other.token_id
        assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [i for i, _ in entry.top] == [i for i, _ in other.top]
        assert [v for _, v in entry.top] == pytest.approx([v for _, v in other.top], abs=1e-4)


@pytest.fixture(scope="module")
def truth(tiny_engine: TinyEngine) -> Truth:
    engine = replace(tiny_engine, max_model_len=MAX_LEN, max_num_batched_tokens=BUDGET)
    return Truth.of(engine, table())


def test_the_table_ends_in_every_way(truth: Truth) -> None:
    reasons = {name: heard.finished.reason for name, heard in truth.heard.items() if heard.finished}
    assert {reasons[name] for name in ("ends", "ends-late", "stops")} == {FinishReason.STOP}
    assert {reasons[name] for name in ("greedy", "goes-on", "echo")} == {FinishReason.LENGTH}
    assert len(truth.heard["ends-late"].token_ids) >= 10
    assert EOS in truth.heard["goes-on"].token_ids[:-1]


@pytest.mark.parametrize(
    ("shape", "acceptance"),
    diagonal([*CHAINS, *TREES, *DYNAMIC], [0.0, 0.5, 1.0], lambda one: getattr(one, "name", one)),
)
def test_trees_of_any_shape_and_luck_give_the_same_text(
    truth: Truth, shape: TreeShape, acceptance: float
) -> None:
    core = truth.speculating(FixedPlanner(shape), acceptance)
    truth.check(generate(core, truth.requests))
    stats = core.stats()
    assert stats.num_drafts > 0
    if acceptance == 1.0:
        assert stats.num_accepted_tokens >= stats.num_drafts * 0.6


MIXED = (chain(3), ROOT, TREES[2], DYNAMIC[0], ROOT, TREES[-1], chain(1))


CHANGES: dict[str, dict[str, object]] = {
    "together": {},
    "no-prefix-cache": {"prefix_caching": False},
    "one-token-each": {"max_num_batched_tokens": 16},
    "odd-chunks": {"max_num_batched_tokens": 17, "max_num_seqs": 3},
    "one-token": {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    "chunks-of-9": {"max_num_batched_tokens": 9, "max_num_seqs": 2, "prefix_caching": False},
    "preempted": {"num_blocks": 14},
    "squeezed": {"num_blocks": 9, "max_num_batched_tokens": 37, "max_num_seqs": 7},
    "squeezed-no-prefix-cache": {"num_blocks": 8, "prefix_caching": False},
}


@pytest.mark.parametrize(("change", "drafts"), diagonal([*CHANGES], ["head", "whims", "lookup"]))
def test_batches_memory_and_changing_shapes_do_not_change_texts(
    truth: Truth, change: str, drafts: str
) -> None:
    changes = CHANGES[change] | {"lookup": drafts == "lookup"}
    core = truth.with_features().speculating(
        CyclingPlanner(MIXED), 0.8, whims=drafts == "whims", changes=changes
    )
    truth.check(generate(core, truth.requests, per_step=2))


def test_a_squeezed_engine_preempts_while_it_speculates(truth: Truth) -> None:
    core = truth.speculating(FixedPlanner(TREES[1]), 0.8, changes={"num_blocks": 11})
    truth.check(generate(core, truth.requests))
    assert core.stats().num_preemptions > 0
    assert core.stats().num_accepted_tokens > 0


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("changes", [{}, {"num_blocks": 24, "max_num_batched_tokens": 40}])
def test_lookups_without_a_head_give_the_same_text_in_fewer_steps(
    tiny_engine: TinyEngine, temperature: float, changes: dict[str, object]
) -> None:
    requests = [
        ask(name, prompt(9, seed) * 3, max_tokens=60, temperature=temperature, seed=seed)
        for seed, name in enumerate("abc")
    ]
    for name, limit in (("circle", None), ("limited", 2), ("never", 0)):
        asked = ask(name, [5, 6], max_tokens=60, logit_bias={7: 50.0}, seed=9)
        requests.append(msgspec.structs.replace(asked, max_draft_nodes=limit))
    plain = tiny_engine.build()
    expected = generate(plain, requests)
    core = replace(tiny_engine, lookup=True, **changes).build()  # type: ignore[arg-type]
    heard = generate(core, requests)
    for name, record in heard.items():
        assert_same(name, record, expected[name])
    ends = {name: record.finished for name, record in heard.items() if record.finished}
    assert ends["never"].num_drafted == 0
    assert 0 < ends["limited"].num_drafted <= 2 * ends["limited"].num_drafts
    stats = core.stats()
    assert stats.steps_by_tree["lookup"] > 0
    assert ends["circle"].num_accepted > 0  # how many depends on measured step times


def test_aborted_neighbours_do_not_change_texts(truth: Truth) -> None:
    core = truth.with_features().speculating(CyclingPlanner(MIXED), 0.8)
    for request in truth.requests:
        core.add(Submit(request))
    kept = {name: Completion() for name in list(truth.heard)[::2]}
    gone = iter(list(truth.heard)[1::2])
    while core.has_work():
        for event in core.step()[:-1]:
            if event.request_id in kept:  # type: ignore[union-attr]
                kept[event.request_id].take(event)  # type: ignore[union-attr, arg-type]
        core.add(Abort(next(gone, "none")))
        core.audit()
    truth.check(kept)


@pytest.mark.extended  # plain torch is slow
def test_the_reference_operations_agree_too(truth: Truth, reference_ops: Ops) -> None:
    engine = replace(truth.engine, ops=reference_ops)
    other = Truth.of(engine, table())
    for planner in (FixedPlanner(TREES[4]), CyclingPlanner(MIXED)):
        other.check(generate(other.speculating(planner), other.requests))


CUTTING = (chain(7), wide_shape(2, 2, 2, 1, 1))


@pytest.mark.parametrize("shape", CUTTING, ids=lambda shape: shape.name)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_max_tokens_at_every_offset(truth: Truth, shape: TreeShape, temperature: float) -> None:
    requests = [
        ask(str(n), prompt(21, 5), max_tokens=n, temperature=temperature, seed=n, logprobs=0)
        for n in range(20)
    ]
    other = Truth.of(truth.engine, requests)
    other.check(generate(other.speculating(FixedPlanner(shape), 1.0), requests))


@pytest.mark.parametrize("shape", CUTTING, ids=lambda shape: shape.name)
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_tokens_at_every_offset(truth: Truth, shape: TreeShape, ignore_eos: bool) -> None:
    ids = prompt(21, 6)
    plain = ask("plain", ids, temperature=1.5, seed=1, ignore_eos=True, logit_bias={EOS: 2.0})
    text = generate(truth.engine.build(), [plain])["plain"].token_ids
    requests = [
        ask(
            f"{stop}/{n}",
            ids,
            temperature=1.5,
            seed=1 + 2**32 * n,
            logit_bias={EOS: 2.0, stop: 4.0},
            stop_token_ids=(stop,),
            min_tokens=n % 5,
            ignore_eos=ignore_eos,
        )
        for n, stop in enumerate(text)
    ]
    other = Truth.of(truth.engine, requests)
    assert len({len(record.token_ids) for record in other.heard.values()}) > 4
    core = other.speculating(FixedPlanner(shape), 1.0)
    other.check(generate(core, requests))


@pytest.mark.parametrize("max_len", [48, 53, 64])
@pytest.mark.parametrize("shape", [*CUTTING, TREES[-1]], ids=lambda shape: shape.name)
def test_the_context_ends_at_every_offset(truth: Truth, shape: TreeShape, max_len: int) -> None:
    requests = [
        ask(
            f"-{n}", prompt(max_len - n, 7), max_tokens=50, temperature=1.0, seed=n, ignore_eos=True
        )
        for n in range(1, 16)
    ]
    scored = ask("full", prompt(max_len, 7), max_tokens=0, seed=77, prompt_logprobs=0)
    other = Truth.of(replace(truth.engine, max_model_len=max_len), [*requests, scored])
    assert [len(other.heard[f"-{n}"].token_ids) for n in range(1, 16)] == list(range(1, 16))
    other.check(generate(other.speculating(FixedPlanner(shape), 1.0), other.requests))


def test_a_prompt_that_fills_all_blocks_can_be_scored(truth: Truth) -> None:
    scored = ask("full", prompt(48, 7), max_tokens=0, seed=77, prompt_logprobs=0)
    other = Truth.of(replace(truth.engine, num_blocks=3), [scored])
    core = other.speculating(FixedPlanner(chain(2)))
    core.add(Submit(scored))
    for _ in range(3):
        core.step()
    assert not core.has_work()


@pytest.mark.parametrize("shape", [chain(7), TREES[4], DYNAMIC[1]], ids=lambda shape: shape.name)
def test_the_cache_holds_the_generated_text_and_nothing_else(
    truth: Truth, shape: TreeShape
) -> None:
    """A second turn that finds the first in the cache gives the same text as without a cache."""
    second = [
        msgspec.structs.replace(
            request,
            request_id=f"{request.request_id}-again",
            prompt_ids=request.prompt_ids + truth.heard[request.request_id].token_ids + [5, 6],
            params=msgspec.structs.replace(
                request.params, seed=1000 + at, max_tokens=8, min_tokens=0, prompt_logprobs=None
            ),
            max_draft_nodes=None,
        )
        for at, request in enumerate(truth.requests)
        if len(request.prompt_ids) < MAX_LEN - 40
    ]
    plain = Truth.of(replace(truth.engine, prefix_caching=False), second)
    core = replace(
        plain.with_features(),
        engine=truth.engine,
        scripts=truth.scripts | plain.with_features().scripts,
    ).speculating(FixedPlanner(shape), 0.8)
    truth.check(generate(core, truth.requests))
    heard = generate(core, second)
    plain.check(heard)
    for request in second:
        finished = heard[request.request_id].finished
        assert finished is not None
        assert finished.num_cached >= (len(request.prompt_ids) - 3) // 16 * 16 - 1


def test_speculation_saves_steps_and_the_counters_add_up(truth: Truth) -> None:
    root_only, core = truth.engine.build(), truth.speculating(FixedPlanner(chain(4)), 1.0)
    generate(root_only, truth.requests)
    heard = generate(core, truth.requests)
    stats, ends = core.stats(), [record.finished for record in heard.values() if record.finished]
    assert stats.num_steps < root_only.stats().num_steps
    assert stats.num_draft_tokens == sum(end.num_drafted for end in ends)
    assert stats.num_accepted_tokens == sum(end.num_accepted for end in ends)
    assert stats.num_accepted_tokens == sum(stats.accepted_per_position)
    assert sum(stats.steps_by_tree.values()) == stats.num_steps
    drafting = {end.request_id for end in ends if end.num_drafted}
    assert drafting == {r.request_id for r in truth.requests if r.max_draft_nodes != 0}
