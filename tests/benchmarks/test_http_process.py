"""The benchmark of the HTTP process: its engine, its clients and its clock."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from pathlib import Path

import pytest

from benchmarks.http_process import (
    Load,
    Pace,
    SpokenEngine,
    loads,
    measure,
    name,
    processor_seconds,
    put_on,
    show,
)
from engine.messages import Finished, Submit, Tokens
from tests.support.engines.in_process import ask
from tests.support.engines.scripted_engine import fail, say
from tests.support.servers.http_server import MODEL, Server, tiny_tokenizer
from tests.support.servers.web_thread import WebThread


def test_the_engine_says_its_text_to_all_requests_at_once() -> None:
    engine = SpokenEngine("", [7, 8, 9], Pace(0.0, 2))
    for request in ("a", "b"):
        engine.take(Submit(ask(request, [5], max_tokens=3)))
    events = [*engine.step(), *engine.step()]
    said = [(e.request_id, e.token_ids) for e in events if isinstance(e, Tokens)]
    assert said == [("a", [7, 8]), ("b", [7, 8]), ("a", [9]), ("b", [9])]
    assert [e.num_output for e in events if isinstance(e, Finished)] == [3, 3]


def test_the_clock_is_that_of_the_process() -> None:
    before, own = processor_seconds(os.getpid()), time.process_time()
    assert abs(before - own) < 0.1
    assert processor_seconds(os.getpid()) >= before


@pytest.mark.parametrize("stream", [True, False])
def test_answers_are_read_to_their_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stream: bool
) -> None:
    load = Load(MODEL, "completion", stream, 2, 5, 3)
    with WebThread(Server(tiny_tokenizer(tmp_path), say([75] * 9))) as web:
        port = int(web.url.rsplit(":", 1)[1].strip("/"))
        row = measure(load, os.getpid(), port, 1, (f"hi {n}" for n in itertools.count()))
        show([row])
        cut = Load(MODEL, "completion", stream, 1, 1, 20)
        web.server.engine.script = fail([75], "lost")
        with pytest.raises(RuntimeError, match="not complete"):
            asyncio.run(put_on(cut, port, iter(["hi"])))
    assert len(web.server.engine.submitted) == 2 * 5 + 1
    assert 0 < row.per_token[0] < row.per_request[0]
    assert "at a time" in capsys.readouterr().out


def test_each_number_of_streams_has_its_loads() -> None:
    found = loads(MODEL, (1, 32), 8)
    assert [(each.streams, each.requests) for each in found[:2]] == [(1, 8), (32, 96)]
    assert len({name(each) for each in found}) == 3
