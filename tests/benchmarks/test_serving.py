"""Open load as a benchmark: the command, and its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import serving
from tests.support.servers.scripted_server import REFUSAL, scripted


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(serving.main)
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_measures_a_server(tmp_path: Path) -> None:
    output = tmp_path / "serving.json"
    with scripted() as server:
        load = ["--rate", "20", "--rate", "40", "--seconds", "0.3", "--output-tokens", "2", "4"]
        load += ["--ttft", "1e6", "--tpot", "1e6"]  # also on a busy machine all are in time
        printed = run("--url", server.url, *load, "--output", str(output))
    content = json.loads(output.read_text(encoding="utf-8"))
    assert [found["rate"] for found in content["rows"]] == [20.0, 40.0]
    assert sum(found["requests"] for found in content["rows"]) == len(server.asked) - 4
    assert "| 20.00 |" in printed


def test_a_server_that_refuses_ends_the_warm_up_with_its_reason() -> None:
    with scripted(manner=REFUSAL) as server, pytest.raises(RuntimeError, match="status 429"):
        run("--url", server.url)
