"""The shipped sample is small and complete, and the model wrote its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drafter.train.data.conversations import Prompt, read_conversations, read_prompts
from engine.checkpoints.source import BUNDLED_ALIAS, resolve_source
from server.text.tokens.tokenizer_files import load_tokenizer

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / "drafter/train/sample"
MAX_BYTES = 80_000
MAX_TOKENS = 96


@pytest.fixture(scope="module")
def prompts() -> dict[str, Prompt]:
    return {prompt.id: prompt for prompt in read_prompts(SAMPLE / "prompts.jsonl")}


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    text = (SAMPLE / "conversations.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_sample_is_small() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.glob("*.jsonl")) <= MAX_BYTES


def test_every_prompt_is_answered_at_both_temperatures(
    prompts: dict[str, Prompt], lines: list[dict[str, Any]]
) -> None:
    answered = sorted((line["id"], line["temperature"]) for line in lines)
    assert answered == sorted((name, t) for name in prompts for t in (0.0, 0.8))
    assert len(list(read_conversations(SAMPLE / "conversations.jsonl"))) == len(lines)


def test_all_that_users_say_is_from_the_prompts(
    prompts: dict[str, Prompt], lines: list[dict[str, Any]]
) -> None:
    for line in lines:
        prompt = prompts[line["id"]]
        given = [m for m in line["messages"] if m["role"] != "assistant"]
        asked = [dict(message) for message in prompt.messages]
        asked += [{"role": "user", "content": turn} for turn in prompt.later_turns]
        assert given == asked[: len(given)]
        assert len(given) == len(asked) or line["finish_reason"] == "length"


def test_answers_are_short(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_source(BUNDLED_ALIAS), tmp_path, None)
    for line in lines:
        answers = [m["content"] for m in line["messages"] if m["role"] == "assistant"]
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in answers]
        assert 0 < min(lengths) <= max(lengths) <= MAX_TOKENS
