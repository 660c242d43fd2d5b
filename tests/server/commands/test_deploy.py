"""`aerie deploy`, without Ray."""

from __future__ import annotations

import importlib.util

import pytest
from typer.testing import CliRunner

from server.cli import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Ray is not installed: pip install 'aerie[ray]'"),
        (["--replicas", "0"], "fleet.replicas"),
        (["--replicas", "3", "--max-replicas", "2"], "not less than fleet.replicas, 3"),
        (["fleet.load_bound=0.5"], "fleet.load_bound"),
        (["fleet.routing=random"], "'prefix' or 'round_robin'"),
        (["--config", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_deployed_is_told_in_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    done = CliRunner().invoke(app, ["deploy", "ray", *arguments])
    assert done.exit_code == 2
    assert done.stderr.startswith("aerie: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
