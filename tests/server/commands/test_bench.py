"""`aerie bench`, against a scripted server."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from server.cli import app
from server.measuring.streams import accepted
from tests.support.servers.scripted_server import REFUSAL, scripted
from tests.support.waiting import DEADLINE

FEW = ("--requests", "4", "--prompt-words", "5", "--output-tokens", "3")
LOAD = ("--rate", "20", "--rate", "40", "--seconds", "0.3", "--output-tokens", "2", "4")
IN_TIME = ("--ttft", "1e6", "--tpot", "1e6", "--drain", f"{DEADLINE}")  # also on a busy machine


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_latency_is_measured_at_each_number_of_streams(tmp_path: Path) -> None:
    output = tmp_path / "latency.json"
    signals = signal.getsignal(signal.SIGTERM)
    with scripted() as server:
        streams = ("--streams", "1", "--streams", "3")
        done = bench("latency", "--url", server.url, *streams, *FEW, "--json", str(output))
    assert done.exit_code == 0, done.output
    assert signal.getsignal(signal.SIGTERM) is signals
    found = json.loads(output.read_text())
    assert [(row["streams"], row["requests"]) for row in found["rows"]] == [(1, 4), (3, 6)]
    assert (found["model"], found["plan"]["output_tokens"]) == ("scripted", 3)
    assert len(server.asked) == 2 + 4 + 6
    assert server.most_open <= 3
    assert len({body["prompt"] for body in server.asked}) == len(server.asked)
    assert {len(body["prompt"].split()) for body in server.asked} == {5}
    rows = [line.split() for line in done.stdout.splitlines()[3:5]]
    assert [row[0] for row in rows] == ["1", "3"]
    assert [row[-1] for row in rows] == ["-", "-"]  # no server of ours: nothing told of drafts
    assert max(map(len, done.stdout.replace(str(output), "").splitlines())) <= 80
    assert "TPOT (also called TTIT)" in done.stdout


def test_load_is_raised_until_requests_are_late(tmp_path: Path) -> None:
    output = tmp_path / "serving.json"
    with scripted() as server:
        done = bench("serving", "--url", server.url, *LOAD, *IN_TIME, "--json", str(output))
        late = bench("serving", "--url", server.url, *LOAD, *IN_TIME, "--ttft", "1e-6")
    assert (done.exit_code, late.exit_code) == (0, 0), done.output
    assert "saturation (fewer than 90% are good): 20.00" in late.stdout
    assert [row["rate"] for row in json.loads(output.read_text())["rows"]] == [20.0, 40.0]
    assert "saturation (fewer than 90% are good): not reached" in done.stdout
    assert max(map(len, done.stdout.replace(str(output), "").splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("latency", "--url", "ftp://a"), "ftp"),
        (("latency", "--url", "http://127.0.0.1:1"), "127.0.0.1:1"),
        (("latency", "--url", "http://127.0.0.1:1", "model.dtype=float32"), "settings are its own"),
        (("serving", "--url", "URL", "--rate", "2", "--rate", "1"), "rates are (2.0, 1.0)"),
        (("serving", "--url", "URL", "--prompt-words", "3", "2"), "prompt_words is 3 2"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    with scripted() as server:
        done = bench(*(server.url if each == "URL" else each for each in arguments))
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert words in line


def test_a_server_that_refuses_ends_the_run_with_its_reason() -> None:
    with scripted(manner=REFUSAL) as server:
        done = bench("latency", "--url", server.url, *FEW)
    assert done.exit_code == 2
    assert "status 429" in done.stderr


def test_tokens_per_step_are_those_of_the_run() -> None:
    before = {"drafts": 10.0, "accepted_tokens": 5.0}
    assert accepted(before, {"drafts": 14.0, "accepted_tokens": 11.0}) == 2.5
    assert accepted(before, before) is None
    assert accepted({}, {}) is None
