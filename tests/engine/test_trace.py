"""A traced request hears which tree each step verified, and that explains every one of its
tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import msgspec
import pytest
import torch

from engine.core import EngineCore
from engine.messages import DraftSource, Finished, Round, Submit, Tokens
from engine.request import Request
from engine.speculation.planner import FixedPlanner
from engine.step.shape import chain
from server.assembly.drafting import Drafting
from tests.support.drafts.knowing_proposer import KnowingProposer
from tests.support.drafts.scripted_proposer import (
    DYNAMIC,
    TREES,
    CyclingPlanner,
    Script,
    ScriptedProposer,
)
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine
from tests.support.text.tiny_grammars import grammars, matching

PROMPT = [17, 30, 18, 31, 17, 30, 18, 31]
# A text that repeats itself, one that a grammar forces in part, and one that is drawn freely.
KINDS: dict[str, dict[str, object]] = {
    "repeats": {"temperature": 0.0, "frequency_penalty": -2.0},
    "forced": {"grammar": matching("(aba){3}c{4}[0-9]{3}"), "temperature": 0.0},
    "free": {"temperature": 1.0},
}
SHAPES = (TREES[2], chain(4), DYNAMIC[0])


def requests(trace: bool) -> list[Request]:
    asked = [
        ask(name, PROMPT, max_tokens=30, ignore_eos=True, seed=at, **params)
        for at, (name, params) in enumerate(KINDS.items())
    ]
    return [msgspec.structs.replace(request, trace=trace) for request in asked]


@pytest.fixture(scope="module")
def engine(tiny_engine: TinyEngine) -> TinyEngine:
    return replace(tiny_engine, grammars=grammars, lookup=True)


@pytest.fixture(scope="module")
def texts(engine: TinyEngine) -> dict[str, list[int]]:
    heard = generate(replace(engine, lookup=False).build(), requests(trace=False))
    return {name: record.token_ids for name, record in heard.items()}


def speculating(engine: TinyEngine, texts: dict[str, list[int]]) -> EngineCore:
    scripts = {at: Script(PROMPT + texts[name]) for at, name in enumerate(KINDS)}
    proposer = ScriptedProposer(scripts, 0.7, 131, engine.max_model_len)
    return replace(engine, drafting=Drafting(proposer, CyclingPlanner(SHAPES))).build()


def events_of(
    core: EngineCore, trace: bool, kinds: Iterable[str] = tuple(KINDS)
) -> tuple[dict[str, list[Tokens]], list[Finished]]:
    heard: dict[str, list[Tokens]] = {name: [] for name in kinds}
    ends = []
    for request in requests(trace):
        if request.request_id in heard:
            core.add(Submit(request))
    while core.has_work():
        for event in core.step():
            if isinstance(event, Tokens):
                heard[event.request_id].append(event)
            elif isinstance(event, Finished):
                ends.append(event)
    return heard, ends


def rounds_of(events: list[Tokens]) -> list[tuple[list[int], Round]]:
    found = []
    for event in events:
        assert event.round is not None
        found.append((event.token_ids, event.round))
    return found


def check_path(token_ids: list[int], round: Round) -> None:
    """The accepted nodes are a path from the root, and their tokens are those that were sent."""
    tokens, parents = round.nodes.tokens, round.nodes.parents
    assert len(tokens) == len(parents)
    assert all(parent <= at for at, parent in enumerate(parents))
    assert [parents[node - 1] for node in round.path] == [0, *round.path][: len(round.path)]
    accepted = [tokens[node - 1] for node in round.path]
    assert token_ids[: len(accepted)] == accepted[: len(token_ids)]
    assert len(token_ids) <= len(accepted) + 1


def test_every_token_is_explained_by_the_round_that_gave_it(
    engine: TinyEngine, texts: dict[str, list[int]]
) -> None:
    heard, ends = events_of(speculating(engine, texts), trace=True)
    sources: Counter[DraftSource | None] = Counter()
    for end in ends:
        rounds = rounds_of(heard[end.request_id])
        for token_ids, round in rounds:
            check_path(token_ids, round)
            assert (round.source is None) == (not round.nodes.tokens)
            sources[round.source] += 1
        assert [token for ids, _ in rounds for token in ids] == texts[end.request_id]
        assert sum(bool(round.nodes.tokens) for _, round in rounds) == end.num_drafts
        assert sum(len(round.nodes.tokens) for _, round in rounds) == end.num_drafted
        accepted = sum(min(len(round.path), len(ids)) for ids, round in rounds)
        assert accepted == end.num_accepted
    assert set(sources) == {None, *DraftSource}


def test_requests_without_a_trace_hear_no_rounds(
    engine: TinyEngine, texts: dict[str, list[int]]
) -> None:
    heard, _ = events_of(speculating(engine, texts), trace=False)
    assert {name: [t for e in each for t in e.token_ids] for name, each in heard.items()} == texts
    assert all(event.round is None for events in heard.values() for event in events)


def test_padded_steps_that_run_ahead_tell_the_same(
    engine: TinyEngine, texts: dict[str, list[int]]
) -> None:
    known = [name for name in KINDS if name != "forced"]  # with a grammar nothing runs ahead
    truth = torch.full((len(KINDS), engine.max_model_len + 64), 5)
    for at, name in enumerate(KINDS):
        truth[at, : len(PROMPT) + len(texts[name])] = torch.tensor(PROMPT + texts[name])
    drafting = Drafting(KnowingProposer(truth), FixedPlanner(chain(4)))
    ahead = replace(engine, padded=True, run_ahead=True, lookup=False, drafting=drafting)
    heard, _ = events_of(ahead.build(), trace=True, kinds=known)
    for name in known:
        rounds = rounds_of(heard[name])
        assert [token for ids, _ in rounds for token in ids] == texts[name]
        assert any(len(round.path) == 4 for _, round in rounds)
        for token_ids, round in rounds:
            check_path(token_ids, round)
