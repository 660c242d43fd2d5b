"""Where a draft head comes from: shipped, a directory, or the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drafter import source
from drafter.source import AUTO, SHIPPED, resolve_draft, shipped_head
from engine.checkpoints.source import BUNDLED_ALIAS

MAX_FILE_BYTES = 16_000_000  # of generated weights in the repository


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_head_is_complete_small_and_says_what_it_is(name: str) -> None:
    folder = shipped_head(name)
    assert resolve_draft(name, "some/model") == folder
    assert all(file.stat().st_size <= MAX_FILE_BYTES for file in folder.iterdir())
    assert "draft_vocab_size" in json.loads((folder / "config.json").read_text("utf-8"))
    card = (folder / "README.md").read_text("utf-8")
    assert "Measured acceptance" in card
    assert "licence" in card


def test_auto_is_the_head_that_ships_for_the_model() -> None:
    assert resolve_draft(AUTO, BUNDLED_ALIAS) == shipped_head("smollm2-135m-instruct-eagle3")
    assert resolve_draft(AUTO, "/models/Llama-3.1-8B-Instruct") is None
    assert resolve_draft(None, BUNDLED_ALIAS) is None


def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_draft("org/name", BUNDLED_ALIAS) == Path("org/name")


def test_a_hub_id_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(hub_id: str) -> Path:
        asked.append(hub_id)
        return tmp_path

    monkeypatch.setattr(source, "fetch_from_hub", fetch)
    assert resolve_draft("org/name", "some/model") == tmp_path
    assert asked == ["org/name"]


@pytest.mark.parametrize("name", ["/nowhere/head", "no-such-head", "a/b/c", ""])
def test_an_unknown_head_is_refused_with_the_accepted_forms(name: str) -> None:
    message = f"no draft head at '{name}'; a draft head is 'auto"
    with pytest.raises(FileNotFoundError, match=message):
        resolve_draft(name, BUNDLED_ALIAS)
