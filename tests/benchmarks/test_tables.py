"""Tables in documents are those of the files of results that they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.tables import ROOT, documents, markdown, renew

SERVING = {
    "benchmark": "serving",
    "date": "2026-01-02 03:04 UTC",
    "device": "a processor",
    "cores": 2,
    "load": [[0.1, 0, 0], [2.0, 0, 0]],
    "server": "peer",
    "goal": {"ttft": 1000.0, "ttit": 100.0, "share": 0.9},
    "plan": {"seconds": 30.0, "prompt_words": [16, 128], "output_tokens": [16, 64]},
    "saturation": 1.5,
    "rows": [
        {
            "rate": 1.0,
            "goodput": 0.96,
            "good": 0.96,
            "ttft_p50": 50.0,
            "ttft_p99": 90.0,
            "ttit_p50": 9.0,
            "ttit_p99": None,
            "tokens_per_second": 40.0,
        }
    ],
}


def test_the_tables_of_the_documents_are_up_to_date() -> None:
    assert [str(path) for path in documents(ROOT) if renew(path, ROOT, write=False)] == []


def test_a_table_is_written_between_its_comments(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(json.dumps(SERVING))
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- table serving found.json -->\nold\n<!-- end -->\nafter\n")
    assert renew(document, tmp_path, write=True)
    lines = document.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "| 1.00 | 0.96 | 96% | 50 | 90 | 9 |  | 40 |" in lines
    assert "old" not in lines
    assert not renew(document, tmp_path, write=True)


def test_an_unknown_kind_of_table_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no table of kind 'other'; there are compare, "):
        markdown("other", {})
