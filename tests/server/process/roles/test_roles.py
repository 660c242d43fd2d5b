"""Prompts that one engine computes and another decodes: router, engines and transfer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from engine.completion import Completion
from engine.core import EngineCore
from engine.messages import (
    EngineMessage,
    EngineStats,
    ErrorCode,
    Finished,
    PagesSent,
    Reserved,
    Round,
    Submit,
    Tokens,
)
from engine.request import FinishReason, Request
from engine.scheduler.handovers import Pages
from engine.speculation.planner import FixedPlanner
from engine.step.shape import chain
from kernels.ops import Ops
from server.assembly.running_requests import mark
from server.process.channel.client import ENGINE_LOST, NO_ENGINE
from server.process.channel.suspects import Suspects
from server.process.channel.totals import total
from server.process.roles.client import RolesClient
from tests.support.engines.engine_pair import Pair
from tests.support.engines.in_process import ask, generate
from tests.support.engines.role_engines import RoleLab, joined
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.heads.head_lab import HeadLab, write_head
from tests.support.waiting import DEADLINE

CHAIN = chain(3)
PROMPT = [3 + (7 * i) % 120 for i in range(150)]
Build = Callable[[], EngineCore]


@pytest.fixture(scope="module")
def lab(native_ops: Ops, tmp_path_factory: pytest.TempPathFactory) -> HeadLab:
    engine = TinyEngine(random_llama(), native_ops)
    return HeadLab(engine, write_head(engine, tmp_path_factory.mktemp("heads") / "head"))


@pytest.fixture(params=["head", "no head"])
def build(request: pytest.FixtureRequest, lab: HeadLab) -> Build:
    if request.param == "head":
        return lambda: lab.build(FixedPlanner(CHAIN))[0]
    return lab.engine.build


def requests() -> list[Request]:
    """Of all kinds; the first has a short prompt, the last one is done with its first token."""
    return [
        ask("short", PROMPT[:20]),
        ask("greedy", PROMPT),
        ask("sampled", PROMPT[5:], temperature=1.0, seed=3, top_p=0.9, logprobs=2),
        ask("penalised", PROMPT[9:], repetition_penalty=1.3, frequency_penalty=0.4, seed=1),
        ask("scored", PROMPT[:96], prompt_logprobs=1, logprobs=0),
        ask("full blocks", PROMPT[2:98], max_tokens=40),
        ask("one token", PROMPT[1:], max_tokens=1),
        ask("no token", PROMPT[4:], max_tokens=0, pooling="last"),
    ]


def same(found: dict[str, Completion], expected: dict[str, Completion]) -> None:
    for name, completion in expected.items():
        assert found[name].finished is not None
        assert completion.finished is not None
        assert found[name].finished.reason is completion.finished.reason, name
        assert found[name].finished.error is None
        assert found[name].finished.num_output == completion.finished.num_output
        for part in ("token_ids", "logprobs", "prompt_logprobs", "pooled"):
            assert getattr(found[name], part) == getattr(completion, part), (name, part)


def served(roles: RoleLab, each: list[Request]) -> dict[str, Completion]:
    for request in each:
        roles.submit(request)
    return roles.finish()


def again(each: list[Request]) -> list[Request]:
    """The same with other ids."""
    return [msgspec.structs.replace(one, request_id=f"{one.request_id} again") for one in each]


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.nixl)])
def test_both_engines_together_give_what_one_gives(build: Build, *, shared: bool) -> None:
    if not shared:
        pytest.importorskip("nixl", reason="the extra `nixl` is not installed")
    expected = generate(build(), requests())
    roles = joined(build(), build(), shared=shared)
    same(served(roles, requests()), expected)
    assert sum(isinstance(event, Reserved) for event in roles.decode[0].said) == 7
    same(served(roles, again(requests())), {f"{name} again": e for name, e in expected.items()})


def test_pages_go_while_the_prompt_is_still_being_computed(build: Build) -> None:
    roles = joined(build(), build())
    served(roles, [ask("a", PROMPT)])
    kinds = [type(event) for event in roles.prefill[0].said]
    sent = [event for event in roles.prefill[0].said if isinstance(event, PagesSent)]
    assert [(event.first_block, event.num_blocks) for event in sent] == [(0, 4), (4, 4), (8, 2)]
    assert kinds.index(PagesSent) < kinds.index(Tokens)
    cached = served(roles, [ask("b", [*PROMPT[:100], *PROMPT])])["b"].finished
    assert cached is not None
    assert cached.num_cached >= 90  # by the engine that computes prompts
    reserved = [event for event in roles.decode[0].said if isinstance(event, Reserved)]
    assert reserved[-1].first_block == 6  # the others were in the cache of the one that decodes


def rounds(events: list[EngineMessage]) -> list[Round | None]:
    return [event.round for event in events if isinstance(event, Tokens)]


def test_the_first_round_drafts_as_though_the_prompt_had_been_computed_here(lab: HeadLab) -> None:
    request = msgspec.structs.replace(ask("a", PROMPT, temperature=1.0, seed=2), trace=True)
    prefill, decode, alone = (lab.build(FixedPlanner(CHAIN))[0] for _ in range(3))
    roles = joined(prefill, decode)
    served(roles, [request])
    alone.add(Submit(request))
    said: list[EngineMessage] = []
    while alone.has_work():
        said += alone.step()
    expected = rounds(said)
    assert expected[1] is not None
    assert expected[1].nodes.tokens
    assert rounds([*roles.prefill[0].said, *roles.decode[0].said]) == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("lost", ["prefill", "decode"])
def test_requests_go_on_where_an_engine_is_left(lab: HeadLab, lost: str, steps: int) -> None:
    def build() -> EngineCore:
        return lab.build(FixedPlanner(CHAIN))[0]

    roles = joined(build(), build())
    for request in requests():
        roles.submit(request)
    for _ in range(steps):
        roles.step()
    (roles.prefill if lost == "prefill" else roles.decode)[0].die()
    same(roles.finish(), generate(build(), requests()))
    assert served(roles, [ask("later", PROMPT)])["later"].token_ids


@pytest.mark.parametrize("num_sent", [0, 3, 9, 14])
def test_pages_that_cannot_be_sent_are_computed_where_they_are_missing(
    build: Build, monkeypatch: pytest.MonkeyPatch, num_sent: int
) -> None:
    roles = joined(build(), build())
    peers = roles.prefill[0].core._peers
    assert peers is not None
    sent, send = [], peers.send

    def send_or_fail(pages: Pages) -> None:
        sent.append(pages)
        if len(sent) > num_sent:
            raise ConnectionError("no route")
        send(pages)

    monkeypatch.setattr(peers, "send", send_or_fail)
    same(served(roles, requests()), generate(build(), requests()))
    assert len(sent) > num_sent
    ends = [event for event in roles.prefill[0].said if isinstance(event, Finished)]
    assert {event.error_code for event in ends} == {ErrorCode.TRANSFER}


def test_a_request_is_ended_when_it_has_lost_two_engines_or_its_client(lab: HeadLab) -> None:
    roles = joined(lab.engine.build(), lab.engine.build())
    for name in ("a", "gone"):
        roles.submit(ask(name, PROMPT, max_tokens=60))
    for _ in range(6):
        roles.step()
    roles.router.abort("gone")
    roles.decode[0].die()
    roles.step()
    roles.prefill[0].die()
    for completion in roles.finish().values():
        assert completion.finished is not None
        assert completion.finished.reason is FinishReason.ERROR
        assert completion.finished.error == ENGINE_LOST
    refused = served(roles, [ask("b", PROMPT)])["b"].finished
    assert refused is not None
    assert refused.error == NO_ENGINE


def test_an_aborted_request_leaves_nothing_behind(lab: HeadLab) -> None:
    for steps in range(7):
        roles = joined(lab.engine.build(), lab.engine.build())
        roles.submit(ask("a", PROMPT, max_tokens=60))
        for _ in range(steps):
            roles.step()
        roles.router.abort("a")
        finished = roles.finish()["a"].finished
        assert finished is not None
        assert finished.reason is FinishReason.ABORT


def test_scarce_blocks_and_lines_are_waited_for(lab: HeadLab) -> None:
    few = replace(lab.engine, num_blocks=26, max_num_seqs=2)
    each = [ask(f"{i}", PROMPT[i:], max_tokens=50) for i in range(5)]
    roles = joined(lab.engine.build(), few.build())
    same(served(roles, each), generate(lab.engine.build(), each))


def test_stats_of_several_engines_are_added_up() -> None:
    one = EngineStats(1, 2, 0.5, 3, 4, 5, 6, 7, accepted_per_position=(1, 2), draft_failed=True)
    other = EngineStats(1, 0, 0.25, 3, 4, 5, 6, 7, steps_by_tree={"root": 2})
    both = total([one, other])
    assert both == EngineStats(
        2,
        2,
        0.5,
        6,
        8,
        10,
        12,
        14,
        accepted_per_position=(1, 2),
        draft_failed=True,
        steps_by_tree={"root": 2},
    )
    assert total([]) is None


def test_what_was_running_when_two_engines_ended_is_refused(tmp_path: Path) -> None:
    async def scene(prefill: Pair, decode: Pair) -> None:
        router = RolesClient([prefill.client], [decode.client])
        peers = [await prefill.engine(), await decode.engine()]
        stream = router.submit(ask("a", PROMPT))
        for pair in (decode, prefill):
            pair.client.suspect({mark("a")})
            pair.client.detach()
            pair.client.num_restarts += 1
        (lost,) = [event async for event in stream]
        assert isinstance(lost, Finished)
        assert lost.error == ENGINE_LOST
        peers += [await prefill.engine(), await decode.engine()]
        (refused,) = [event async for event in router.submit(ask("b", PROMPT))]
        assert isinstance(refused, Finished)
        assert refused.error_code is ErrorCode.REFUSED
        assert router.num_restarts == 2
        for pair in (prefill, decode):
            pair.client.step_sizes.observe(EngineStats(1, 2, 0.5, 3, 4, 5, 6, 7))
        assert router.step_sizes.num_tokens == 14
        assert list(router.step_sizes.counts)[:3] == [0, 2, 0]
        for peer in peers:
            peer.close()

    async def main() -> None:
        suspects = Suspects(60)
        pairs = []
        for name in ("prefill", "decode"):
            folder = tmp_path / name
            folder.mkdir()
            pairs.append(Pair(folder, suspects))
        try:
            await asyncio.wait_for(scene(*pairs), DEADLINE)
        finally:
            for pair in pairs:
                pair.close()

    asyncio.run(main())
