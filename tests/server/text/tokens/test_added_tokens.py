"""Tokens that only the files next to tokenizer.json name are the tokens of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from engine.checkpoints.source import ModelFiles
from server.text.output.detokenizer import IncrementalDetokenizer
from server.text.tokens.tokenizer import Tokenizer
from server.text.tokens.tokenizer_files import load_tokenizer

TEXT = "<|new|>user hi<|other|> x<|im_end|>"
FIRST = 344  # the vocabulary of the tiny tokenizer ends before it


def token(text: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": text, "special": True, **plain, **flags}


def loaded(folder: Path, **files: dict[str, Any]) -> Tokenizer:
    """The tokenizer of `folder` after keys were added to its JSON files."""
    for name, keys in files.items():
        path = folder / f"{name}.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps(content | keys), encoding="utf-8")
    return load_tokenizer(ModelFiles("hf", folder, "test"), folder / "cache", None)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.mark.parametrize(
    "files",
    [
        {
            "tokenizer_config": {
                "added_tokens_decoder": {
                    "345": token("<|other|>", special=False, lstrip=True),
                    "344": token("<|new|>"),
                    "2": token("<|im_end|>"),
                }
            }
        },
        {"added_tokens": {"<|new|>": FIRST, "<|other|>": FIRST + 1}},
        {
            "added_tokens": {"<|new|>": FIRST, "<|other|>": FIRST + 1},
            "tokenizer_config": {"additional_special_tokens": ["<|new|>"]},
        },
        {"tokenizer_config": {"additional_special_tokens": ["<|new|>", "<|other|>"]}},
        {"tokenizer_config": {"extra_special_tokens": {"image_token": "<|new|>"}}},
        {"special_tokens_map": {"additional_special_tokens": ["<|new|>"]}},
        {"tokenizer_config": {"eos_token": "<|new|>"}},
    ],
    ids=lambda files: "+".join(f"{name}:{','.join(keys)}" for name, keys in files.items()),
)
def test_tokens_of_the_other_files_are_those_of_transformers(
    folder: Path, files: dict[str, dict[str, Any]]
) -> None:
    found = loaded(folder, **files)
    oracle = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = oracle(TEXT)["input_ids"]
    assert found.encode(TEXT) == ids
    assert found.special_ids == {i for i, t in oracle.added_tokens_decoder.items() if t.special}
    for skip in (True, False):
        assert found.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)
        text = IncrementalDetokenizer(found, skipped=None if skip else ()).add(ids)
        assert text == oracle.decode(ids, skip_special_tokens=skip)


def test_a_token_that_would_get_another_id_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"give '<\|new\|>' the id 400.*would get the id 344"):
        loaded(folder, tokenizer_config={"added_tokens_decoder": {"400": token("<|new|>")}})


def test_a_padding_token_of_no_id_is_not_added(folder: Path) -> None:
    assert loaded(folder, tokenizer_config={"pad_token": "[PAD]"}).vocab_size == FIRST


@pytest.mark.parametrize(
    "table", [{"x": token("<|new|>")}, {"344": {"special": True}}, ["<|new|>"], {"344": "<|new|>"}]
)
def test_invalid_tables_of_tokens_are_refused_with_the_folder(folder: Path, table: object) -> None:
    with pytest.raises(ValueError, match="model has no usable tokenizer"):
        loaded(folder, tokenizer_config={"added_tokens_decoder": table})
