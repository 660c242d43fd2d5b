"""What clients see when a rank is killed or hangs, and what happens to the other ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from kernels.registry import build_ops
from server.process.supervision.process_table import children_of
from tests.support.heads.tiny_heads import write_tiny_head
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.ranks.starved_rank import starving
from tests.support.servers.live_server import LiveServer, wait_gone
from tests.support.waiting import DEADLINE, wait_until

MAX_LEN = 8192
NUM_STREAMS = 20
PATIENCE = 10  # seconds for a step, which on a busy machine takes longer than usual
SHORT: dict[str, Any] = {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "temperature": 0}
ENDLESS = SHORT | {"max_tokens": MAX_LEN - 100, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def wish(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file: rank 1 runs out of the kind of memory that is written in it."""
    return tmp_path_factory.mktemp("wish") / "wish"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, native_cache: Path) -> tuple[str, ...]:
    """Of a server with three ranks."""
    base = tmp_path_factory.mktemp("failures")
    build_ops("auto", torch.device("cpu"), torch.float32, 1, native_cache)  # compiled once, here
    spec = TinyLlama(
        num_heads=3,
        num_kv_heads=3,
        hidden_size=96,
        intermediate_size=96,
        max_position_embeddings=MAX_LEN,
    )
    (base / "model").mkdir()
    write_tiny_llama(base / "model", spec)
    return (
        f"model.source={base / 'model'}",
        "model.served_name=tiny",
        "model.dtype=float32",
        f"speculation.draft={write_tiny_head(base / 'head', spec)}",
        "speculation.tree=chain2",
        "cache.num_blocks=2048",
        "parallel.tensor=3",
        f"parallel.timeout={DEADLINE}",
        "server.refuse_suspects=0",  # the same requests run at every death
        f"files.dir={native_cache}",
    )


@pytest.fixture(scope="module")
def server(
    settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, wish: Path
) -> Iterator[LiveServer]:
    """Each test leaves it serving."""
    base = tmp_path_factory.mktemp("start")
    with LiveServer(*settings, extra=starving(base, 1, wish)) as live:
        yield live
        handles = [os.pidfd_open(pid) for pid in ranks(live)]
        assert live.stop() == 0
        for handle in handles:
            wait_gone(handle)


def ranks(server: LiveServer) -> list[int]:
    """Process ids of rank 0 (the engine process) and its followers."""
    return [server.engine_pid, *sorted(children_of(server.engine_pid))]


def text_of(server: LiveServer) -> str:
    return str(server.client().completions.create(**SHORT).choices[0].text)


def check_service(server: LiveServer, since: int, before: str, lost: list[int]) -> None:
    """New ranks give the same text as the `lost` ones. `since`: earlier length of the log."""
    server.log.wait_for("3 ranks over gloo", since)  # polling would slow their start
    server.wait_status("/ready", 200)
    assert set(ranks(server)).isdisjoint(lost)
    assert text_of(server) == before


def check_lost(server: LiveServer, strike: Callable[[list[int]], None]) -> None:
    """Harm the ranks during many streams: all streams end with an error, no rank is left, and
    service resumes with the same text."""
    before, client, since = text_of(server), server.client(), len(server.log.text())
    lost = ranks(server)
    assert len(lost) == 3
    handles = [os.pidfd_open(pid) for pid in lost]
    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        streams = [client.completions.create(**ENDLESS, stream=True) for _ in range(NUM_STREAMS)]
        for stream in streams:
            next(iter(stream))
        strike(lost)
        ends = [threads.submit(list, stream) for stream in streams]
        for end in ends:
            with pytest.raises(openai.APIError, match="failed to finish"):
                end.result()
    for handle in handles:
        wait_gone(handle)
    check_service(server, since, before, lost)


def write(path: Path, text: str) -> None:
    """Write a file atomically, so that readers see all of it."""
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.rename(path)


def test_a_killed_follower_fails_open_requests_and_service_resumes(server: LiveServer) -> None:
    check_lost(server, lambda ranks: os.kill(ranks[2], signal.SIGKILL))
    assert "rank 2 has ended" in server.log.text() or "engine failed" in server.log.text()


@pytest.mark.parallel
def test_a_follower_that_hangs_is_noticed_within_the_timeout(settings: tuple[str, ...]) -> None:
    with LiveServer(*settings, f"parallel.timeout={PATIENCE}") as server:
        check_lost(server, lambda ranks: os.kill(ranks[1], signal.SIGSTOP))
        assert f"a rank does not answer: a step has taken {PATIENCE} s" in server.log.text()


@pytest.mark.parallel
def test_followers_end_with_rank_0(server: LiveServer) -> None:
    check_lost(server, lambda ranks: os.kill(ranks[0], signal.SIGKILL))


@pytest.mark.parallel
def test_a_follower_that_hangs_does_not_outlive_rank_0(server: LiveServer) -> None:
    def strike(ranks: list[int]) -> None:
        os.kill(ranks[1], signal.SIGSTOP)
        os.kill(ranks[0], signal.SIGKILL)

    since = len(server.log.text())
    check_lost(server, strike)
    assert "processes of the engine do not end with it" in server.log.text()[since:]


@pytest.mark.parallel
def test_ranks_killed_while_they_load_leave_no_file(
    server: LiveServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    temporary = tmp_path_factory.mktemp("tmp")
    once = ("server.restart_engine=false", *server.overrides)
    with LiveServer(*once, wait=False, extra={"TMPDIR": str(temporary)}) as other:
        wait_until(lambda: list(temporary.glob("aerie-engine-*/aerie-ranks-*")))
        os.kill(other.engine_pid, signal.SIGKILL)
        assert other.wait() == 1
    assert list(temporary.glob("aerie-*")) == []


@pytest.mark.parallel
@pytest.mark.parametrize("kind", ["device", "host"])
def test_a_follower_without_memory_ends_the_group_and_service_resumes(
    server: LiveServer, wish: Path, kind: str
) -> None:
    since = len(server.log.text())
    check_lost(server, lambda _: write(wish, kind))
    said = server.log.text()[since:]
    assert "rank 1 failed" in said
    assert "no room for a test" in said
    assert "starting the engine again" in said


@pytest.mark.parallel
def test_a_follower_killed_while_idle_is_noticed_too(server: LiveServer) -> None:
    before, lost, since = text_of(server), ranks(server), len(server.log.text())
    handle = os.pidfd_open(lost[0])
    os.kill(lost[1], signal.SIGKILL)
    wait_gone(handle)
    check_service(server, since, before, lost)
