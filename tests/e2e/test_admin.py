"""Draft heads swapped while streams run on a real port; and sequences captured by a real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import httpx
import pytest

from engine.checkpoints.arch import LlamaArch
from tests.e2e.conftest import MAX_LEN, MODEL
from tests.support.heads.parallel_heads import write_parallel_head
from tests.support.heads.tiny_heads import write_tiny_head
from tests.support.models.tiny_llama import TinyLlama
from tests.support.servers.live_server import LiveServer, idle, run_aerie
from tests.support.waiting import DEADLINE, wait_until

MakeServer = Callable[..., LiveServer]
PATH = "/admin/draft"
ADMIN = {"authorization": "Bearer root"}
SPEC = TinyLlama(max_position_embeddings=MAX_LEN)
NUM_STREAMS = 20
LEARNING = 900  # seconds for a round
SHARED = "a server answers many clients at once and never loses a token " * 2


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two heads of different shapes, and two that draft in parallel."""
    base = tmp_path_factory.mktemp("heads")
    target = LlamaArch.from_hf_config(SPEC.config().to_dict())
    return [
        write_tiny_head(base / "first", SPEC),
        write_tiny_head(base / "second", SPEC, draft_vocab=97, num_layers=2, seed=2),
        write_parallel_head(base / "third", target, "peagle", draft_vocab=200),
        write_parallel_head(base / "fourth", target, "dflash", draft_vocab=120),
    ]


def asked(number: int) -> dict[str, Any]:
    """Requests: half greedy, half seeded; half with a common prefix."""
    return {
        "model": MODEL,
        "prompt": (SHARED if number % 4 < 2 else "") + f"number {number}",
        "max_tokens": 150,
        "temperature": number % 2,
        "seed": number,
        "extra_body": {"ignore_eos": True, "stop": ["<nothing>"]},
    }


def texts(server: LiveServer, *, streaming: Event | None = None) -> list[str]:
    """The texts of all requests, sent together; `streaming` is set when each has its first
    text."""
    client = server.client()
    started = Barrier(NUM_STREAMS, action=None if streaming is None else streaming.set)

    def text(number: int) -> str:
        stream = client.completions.create(**asked(number), stream=True)
        parts = [next(iter(stream)).choices[0].text]
        started.wait(DEADLINE)
        return "".join([*parts, *(chunk.choices[0].text for chunk in stream)])

    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        return list(threads.map(text, range(NUM_STREAMS)))


def swap(server: LiveServer, path: Path | None) -> httpx.Response:
    return server.post(PATH, {"path": path and str(path)}, headers=ADMIN)


def test_swapping_heads_changes_none_of_twenty_running_streams(
    make_server: MakeServer, server: LiveServer, heads: list[Path], tmp_path: Path
) -> None:
    assert server.get("/info").json()["engine"]["draft"] is None
    expected = texts(server)
    first, second, peagle, dflash = heads
    options = (f"speculation.draft={first}", "speculation.tree=tree8", "server.admin_keys=[root]")
    with make_server(*options) as drafting:
        streaming = Event()
        with ThreadPoolExecutor(1) as thread:
            heard = thread.submit(texts, drafting, streaming=streaming)
            assert streaming.wait(DEADLINE)
            for path in (second, None, peagle, first, tmp_path / "none", dflash):
                answer = swap(drafting, path)
                assert answer.status_code == (400 if path == tmp_path / "none" else 200)
            assert heard.result() == expected
        assert answer.json()["draft"]["path"] == str(dflash)
        assert answer.json()["draft"]["kind"] == "dflash"
        engine = drafting.get("/info").json()["engine"]
        assert engine["draft"] == answer.json()["draft"]
        found = drafting.wait_metrics(idle)
        assert found["spec_decode_num_drafts_total"] > 0
        assert found["ended_length"] == NUM_STREAMS
        assert texts(drafting) == expected, "prefixes are cached from earlier heads"
        assert "draft head in use" in drafting.log.text()
        assert drafting.stop() == 0


def test_keys_and_bad_heads_of_a_server_that_began_without_a_head(
    make_server: MakeServer, heads: list[Path], tmp_path: Path
) -> None:
    with make_server("server.admin_keys=[root]", "server.api_keys=[user]") as server:
        assert server.resolved["config"]["server"]["admin_keys"] == ["***"]
        for key in ("user", "wrong"):
            headers = {"authorization": f"Bearer {key}"}
            assert server.post(PATH, {"path": None}, headers=headers).status_code == 401
        assert server.post(PATH, {"path": None}).status_code == 401
        other = write_tiny_head(tmp_path / "other", TinyLlama(hidden_size=96))
        (tmp_path / "empty").mkdir()
        for path, reason in (
            (other, "hidden_size 96, this one has 64"),
            (tmp_path / "none", "no draft head at"),
            (tmp_path / "empty", "config.json"),
        ):
            error = swap(server, path).json()["error"]
            assert error["param"] == "path"
            assert reason in error["message"]
        assert swap(server, heads[0]).json()["draft"]["num_layers"] == 1
        assert swap(server, None).json() == {"draft": None}
        assert server.stop() == 0


def test_a_server_captures_its_sequences_if_it_may(make_server: MakeServer, tmp_path: Path) -> None:
    folder = tmp_path / "captured"
    options = ("--capture", str(folder), "--capture-consent", "capture.sample_rate=1")
    # On a busy machine, an engine may be ended before it has completed a shard that is still open.
    with make_server(*options, "capture.shard_tokens=10") as server:
        client = server.client()
        reply = client.completions.create(
            model=MODEL, prompt=[5, 6, 7, 8], max_tokens=9, temperature=0
        )
        assert reply.usage is not None
        found = server.wait_metrics(idle)
        assert found["captured_sequences_total"] == 1
        assert found["capture_dropped_total"] == 0
        wait_until((folder / "captured-00000.jsonl").exists)
        assert server.stop() == 0
    (path,) = folder.iterdir()
    assert path.name == "captured-00000.jsonl"
    (line,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert line["token_ids"][:4] == [5, 6, 7, 8]
    assert len(line["token_ids"]) == reply.usage.total_tokens
    assert (line["num_prompt"], line["temperature"]) == (4, 0.0)


def test_capture_without_consent_is_an_error_at_start(tmp_path: Path) -> None:
    done = run_aerie("serve", "--capture", str(tmp_path))
    assert done.returncode == 2
    assert "capture.consent is not true" in done.stderr
    assert "--capture-consent" in done.stderr


@pytest.mark.timeout(2 * LEARNING)
def test_the_head_learns_from_what_the_server_answers(
    make_server: MakeServer, heads: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "captured"
    options = (
        f"speculation.draft={heads[0]}",
        "speculation.tree=chain3",
        "speculation.learn=true",
        "speculation.learn_tokens=2000",
        "speculation.learn_steps=2",
        "speculation.learn_gain=0",
        f"capture.dir={folder}",
        "capture.consent=true",
        "capture.sample_rate=1.0",
        "server.admin_keys=[root]",
    )
    with make_server(*options) as server:
        path = "/admin/learning"
        assert server.get(path).status_code == 401
        expected = texts(server)
        paused = server.post(path, {"paused": True}, headers=ADMIN).json()
        assert paused["paused"]
        assert server.post(path, {"paused": 1}, headers=ADMIN).status_code == 400
        server.post(path, {"paused": False}, headers=ADMIN)
        assert texts(server) == expected, "now enough of the same sequences are held out"
        # The trainer has the lowest priority: beside other work it may wait for long.
        server.log.wait_for("a round of learning: |did not learn: ", within=LEARNING)
        assert server.metrics()["learning_rounds_total"] > 0
        status = server.get(path, headers=ADMIN).json()
        assert status["num_failed"] == 0, status
        assert status["held_out_before"] >= 1
        assert texts(server) == expected
        assert server.stop() == 0
