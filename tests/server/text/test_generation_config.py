"""The model's own sampling parameters, as its folder names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.schema import Config, ModelConfig
from engine.checkpoints.source import ModelFiles
from server.text.generation_config import NAME, SamplingDefaults, load_defaults
from tests.support.configurations import hosted

LLAMA = {"do_sample": True, "eos_token_id": [1, 2], "temperature": 0.6, "top_p": 0.9}
EVERYTHING = {
    "temperature": 0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_new_tokens": 2048,
}


def load(folder: Path, content: object, setting: str = "model") -> SamplingDefaults:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / NAME).write_text(text)
    config = hosted(Config.model_validate({"model": {"generation_config": setting}}))
    return load_defaults(config, ModelFiles("hf", folder, "a"))


@pytest.mark.parametrize(
    ("content", "setting", "named"),
    [
        (LLAMA, "model", {"temperature": 0.6, "top_p": 0.9}),
        (EVERYTHING, "model", EVERYTHING),
        ({"temperature": None}, "model", {}),
        (LLAMA, "none", {}),
        ("no JSON", "none", {}),
        (None, "model", {}),
    ],
)
def test_parameters_are_those_that_the_file_names(
    tmp_path: Path, content: object, setting: str, named: dict[str, float]
) -> None:
    assert load(tmp_path, content, setting).named() == named


def test_a_gguf_file_has_none(tmp_path: Path) -> None:
    files = ModelFiles("gguf", tmp_path / "a.gguf", "a")
    assert load_defaults(hosted(Config(model=ModelConfig())), files) == SamplingDefaults()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": "0.5"},
        {"top_p": 0},
        {"top_k": 1.5},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_new_tokens": True},
        {"max_new_tokens": 0},
        {"temperature": float("nan")},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_used_is_named_with_the_way_out(
    tmp_path: Path, bad: dict[str, object]
) -> None:
    (name,) = bad
    message = rf"{NAME}: {name} is .*: it must be .*model\.generation_config=none"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, bad)


@pytest.mark.parametrize("content", ["[1]", "{"])
def test_a_file_that_is_no_object_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match=NAME):
        load(tmp_path, content)
