"""What a model's generation_config.json says for requests that leave a sampling parameter open."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from configs.files import read_text
from configs.resolve import HostConfig
from engine.checkpoints.source import ModelFiles

NAME = "generation_config.json"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The model's defaults; None: it names none, and the API's own default is used.

    Explicit values of a request win, also over `max_new_tokens`. `do_sample` has no effect: a
    temperature says it all.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    def named(self) -> dict[str, float]:
        """Those that the model names."""
        return {name: value for name, value in asdict(self).items() if value is not None}


ALLOWED: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 <= value <= 100, "a number from 0 to 100"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "top_k": (lambda value: value >= -1 and value == int(value), "a whole number, at least -1"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda value: 0.01 <= value <= 100, "a number from 0.01 to 100"),
    "max_new_tokens": (lambda value: value >= 1 and value == int(value), "a whole number above 0"),
}


def load_defaults(config: HostConfig, files: ModelFiles) -> SamplingDefaults:
    """The defaults of the model in `files`, if `model.generation_config` asks for them. A .gguf
    file has none.

    Raises:
        ValueError: the file is invalid; the message says how to do without it.
    """
    path = files.path / NAME
    if config.model.generation_config == "none" or files.kind != "hf" or not path.is_file():
        return SamplingDefaults()
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    found = {field.name: content.get(field.name) for field in fields(SamplingDefaults)}
    for name, value in found.items():
        _check(path, name, value)
    return SamplingDefaults(**found)


def _check(path: Path, name: str, value: Any) -> None:
    is_allowed, allowed = ALLOWED[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and is_allowed(value)):
        raise ValueError(
            f"{path}: {name} is {value!r}: it must be {allowed}; with model.generation_config=none "
            "the file's sampling parameters are not used"
        )
