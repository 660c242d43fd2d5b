"""The options of `aerie plan`, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.commands.plan import parse_bytes
from server.planning.prediction import batch_sizes, context_tokens


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("1.5 GB", 1_500_000_000), ("512MiB", 2**29), ("3MB", 3_000_000)],
)
def test_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    assert parse_bytes(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["80", "GiB", "-1GiB", "0GB", "1e3GB", "1.2.3GB", "8 TB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--gpu-memory .* is not a size such as 80GiB"):
        parse_bytes(text, "--gpu-memory")


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("1..8", (1, 2, 4, 8)), ("3..20", (3, 4, 8, 16, 20)), ("1,64, 8", (1, 64, 8)), ("5", (5,))],
)
def test_batch_sizes_are_lists_or_ranges(text: str, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "0", "8..1", "1..", "1;2", "1..5000", "-1"])
def test_other_batch_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--batch "):
        batch_sizes(text)


def test_contexts_are_numbers_of_tokens() -> None:
    assert (context_tokens("8k"), context_tokens("1000")) == (8192, 1000)
    with pytest.raises(ValueError, match=r"--context '8M': give a number of tokens, as 1000 or 8k"):
        context_tokens("8M")


def test_the_command_prints_tables_and_writes_files(tmp_path: Path) -> None:
    files = ["--svg", str(tmp_path / "plan.svg"), "--json", str(tmp_path / "plan.json")]
    asked = ["plan", "--config", "llama4-maverick-8xh100-fp8", "--batch", "1,64"]
    done = CliRunner().invoke(app, [*asked, *files], env={"COLUMNS": "120"})
    assert (done.exit_code, done.stderr) == (0, "")
    wanted = ["Memory: 8 GPUs of 74.5 GiB", "target weights", "on 8 x H100, context 8192"]
    wanted += ["A round at batch 1", "sums over GPUs", "sequences of 8192 tokens at once"]
    assert [text for text in wanted if text not in done.stdout] == []
    batches = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["batches"]
    assert [batch["batch"] for batch in batches] == [1, 64]
    assert (tmp_path / "plan.svg").read_bytes().startswith(b"<svg")


@pytest.mark.parametrize(
    "terminal", [{}, {"COLUMNS": "20"}, {"FORCE_COLOR": "1", "TERM": "dumb", "NO_COLOR": "1"}]
)
def test_no_width_cuts_a_value(terminal: dict[str, str | None]) -> None:
    """`{}`: a pipe or a file, which counts as 80 columns."""
    asked = ["plan", "--config", "llama33-70b-8xh100", "--head", "eagle3", "--batch", "1,4096"]
    wide = CliRunner().invoke(app, asked, env={"COLUMNS": "400"}).stdout
    found = CliRunner().invoke(app, asked, env={"COLUMNS": None} | terminal).stdout
    assert "…" not in found
    assert found.split() == wide.split()


def test_a_wrong_option_is_one_line() -> None:
    done = CliRunner().invoke(app, ["plan", "--gpu", "a100", "speculation.draft=null"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("aerie: no GPU 'a100'; known: b200, h100, h200")
