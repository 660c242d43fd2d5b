"""Find and load a model's tokenizer, by the fastest way its files allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from configs.files import check_regular, read_text
from engine.checkpoints.gguf_file import read_gguf
from engine.checkpoints.source import ModelFiles
from server.text.gguf_tokenizer import build_tokenizer, is_byte_level, special_tokens
from server.text.tokenizer import Tokenizer
from server.text.tokenizer_cache import converted_folder

MAX_TOKENIZER = 2**30  # bytes of tokenizer.json
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(files: ModelFiles, cache_dir: Path, chat_template: str | None) -> Tokenizer:
    """Load the tokenizer of a model; `chat_template` (Jinja source) replaces the model's own.

    Byte-level GGUFs and directories with a tokenizer.json load directly. Others are converted once
    by transformers and kept under `cache_dir`. ValueError when the files cannot be loaded.
    """
    if files.kind == "hf" and (files.path / "tokenizer.json").is_file():
        return _from_folder(files.path, chat_template)
    if files.kind == "gguf":
        metadata = read_gguf(files.path).metadata
        if is_byte_level(metadata):
            return _from_metadata(files.path, metadata, chat_template)
    return _from_folder(converted_folder(files, cache_dir), chat_template)


def _from_metadata(path: Path, metadata: dict[str, Any], chat_template: str | None) -> Tokenizer:
    template = chat_template or metadata.get("tokenizer.chat_template")
    try:
        return Tokenizer(build_tokenizer(metadata), special_tokens(metadata), template)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} has no usable tokenizer: {error}") from error


def _from_folder(folder: Path, chat_template: str | None) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        check_regular(path, MAX_TOKENIZER)
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    config = _read_json(folder / "tokenizer_config.json")
    template = chat_template or _chat_template(folder, config)
    return Tokenizer(backend, _special_tokens(folder, config), template)


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    table = _read_json(folder / "special_tokens_map.json") | config
    texts: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        entry = table.get(name)
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str):
            texts[name] = text
    return texts


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json: a string, or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content
