"""Byte-level tokenizers built from GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.tokens.gguf_tokenizer import (
    CONTROL,
    USER_DEFINED,
    build_tokenizer,
    is_byte_level,
    special_tokens,
)
from server.text.tokens.tokenizer import Tokenizer
from server.text.tokens.tokenizer_files import metadata_template

NORMAL = 1


@pytest.fixture(scope="module")
def metadata(tiny_folder: Path) -> dict[str, Any]:
    """Metadata that a converter would write for the tiny tokenizer."""
    model = json.loads((tiny_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def build(metadata: dict[str, Any], **changes: object) -> Tokenizer:
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return Tokenizer(build_tokenizer(changed), special_tokens(changed), None)


def split(metadata: dict[str, Any], pre: str | None, text: str) -> list[str]:
    """Where the text is split before merging."""
    backend = build_tokenizer(metadata | {"tokenizer.ggml.pre": pre})
    pieces = backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[begin:end] for _, (begin, end) in pieces]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(max_size=30) | st.text("the quick brown fox 123 \n<|im_end|>", max_size=40))
def test_metadata_gives_the_tokenizer_it_was_made_from(
    tiny: Tokenizer, metadata: dict[str, Any], text: str
) -> None:
    built = build(metadata)
    ids = built.encode(text)
    assert ids == tiny.encode(text)
    assert built.decode(ids) == tiny.decode(ids)


def test_special_tokens_are_those_the_file_marks(metadata: dict[str, Any]) -> None:
    built = build(metadata)
    assert built.special_ids == {0, 1, 2}
    assert built.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_user_defined_tokens_are_whole_but_not_special(metadata: dict[str, Any]) -> None:
    tokens = [*metadata["tokenizer.ggml.tokens"], "<tool>"]
    types = [*metadata["tokenizer.ggml.token_type"], USER_DEFINED]
    built = build(metadata, tokens=tokens, token_type=types)
    ids = built.encode("a<tool>b")
    assert ids[1] == len(tokens) - 1
    assert built.decode(ids) == "a<tool>b"


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("gpt-2", {}, []),
        ("llama-bpe", {}, ["bos"]),
        ("llama-bpe", {"add_bos_token": False}, []),
        ("llama3", {}, ["bos"]),
        ("smaug-bpe", {}, []),
        ("default", {}, []),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ["bos", "eos"]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_asks(
    metadata: dict[str, Any], pre: str, flags: dict[str, bool], expected: list[str]
) -> None:
    built = build(metadata, pre=pre, **flags)
    inner = built.encode("a", add_special_tokens=False)
    before = [1] if "bos" in expected else []
    behind = [2] if "eos" in expected else []
    assert built.encode("a") == [*before, *inner, *behind]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "I'll take 1234", ["I", "'ll", " take", " 1234"]),
        ("smollm", "a 1234", ["a", " ", "1", "2", "3", "4"]),
        ("llama-bpe", "a1234567 x", ["a", "123", "456", "7", " x"]),
        ("llama-bpe", "I'LL go!\n\nnow", ["I", "'LL", " go", "!\n\n", "now"]),
        ("llama-bpe", "a   b", ["a", "  ", " b"]),
        ("llama3", "a1234567 x", ["a", "123", "456", "7", " x"]),
        ("llama-v3", "I'LL go!", ["I", "'LL", " go", "!"]),
        ("smaug-bpe", "I'LL a1234", ["I", "'LL", " a", "123", "4"]),
        ("default", "I'll a = 12345", ["I", "'", "ll", " a", " ", "=", " ", "123", "45"]),
        (None, "x, y\n\n1234", ["x", ",", " y", "\n", "\n", "123", "4"]),
    ],
)
def test_text_is_split_as_the_model_was_trained(
    metadata: dict[str, Any], pre: str | None, text: str, pieces: list[str]
) -> None:
    assert split(metadata, pre, text) == pieces


def test_a_word_of_llama_3_is_used_without_merging(metadata: dict[str, Any]) -> None:
    tokens = [*metadata["tokenizer.ggml.tokens"], "zzqq"]
    types = [*metadata["tokenizer.ggml.token_type"], NORMAL]
    changes = {"tokens": tokens, "token_type": types, "add_bos_token": False}
    assert build(metadata, pre="llama-bpe", **changes).encode("zzqq") == [len(tokens) - 1]
    assert len(build(metadata, pre="gpt-2", **changes).encode("zzqq")) == 4


def test_an_unknown_splitting_is_refused_with_the_known_ones(metadata: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'tekken' is not supported \(default, gpt-2, smollm"):
        build(metadata, pre="tekken")


def test_a_file_may_hold_only_a_template_with_a_name(metadata: dict[str, Any]) -> None:
    prefix, file = "tokenizer.chat_template", Path("m.gguf")
    assert metadata_template(file, metadata) is None
    assert metadata_template(file, {f"{prefix}.tool_use": "tools"}) == "tools"
    assert metadata_template(file, {prefix: "plain", f"{prefix}.tool_use": "tools"}) == "plain"


def test_other_kinds_are_not_byte_level() -> None:
    assert not is_byte_level({"tokenizer.ggml.model": "llama"})
    assert not is_byte_level({})
