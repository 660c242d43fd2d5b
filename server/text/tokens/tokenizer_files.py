"""Find and load a model's tokenizer, by the fastest way its files allow."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from configs.files import check_regular, read_text
from engine.checkpoints.gguf_files.header import read_gguf
from engine.checkpoints.source import ModelFiles
from server.text.tokens.added_tokens import TokenFiles, complete
from server.text.tokens.gguf_tokenizer import build_tokenizer, is_byte_level, special_tokens
from server.text.tokens.tokenizer import Tokenizer
from server.text.tokens.tokenizer_cache import converted_folder

MAX_TOKENIZER = 2**30  # bytes of tokenizer.json
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
DEFAULT = "default"  # the name of a template among several

logger = logging.getLogger(__name__)


def has_tokenizer(files: ModelFiles) -> bool:
    """Whether the model comes with a tokenizer; without one it can only take token ids."""
    if files.kind == "gguf":
        return "tokenizer.ggml.model" in read_gguf(files.path).metadata
    return any((files.path / name).is_file() for name in TOKENIZERS)


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
    template = chat_template or metadata_template(path, metadata)
    try:
        return Tokenizer(build_tokenizer(metadata), special_tokens(metadata), template)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} has no usable tokenizer: {error}") from error


def metadata_template(path: Path, metadata: dict[str, Any]) -> str | None:
    """The default template of a GGUF, else one of those that have names."""
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): metadata[key] for key in metadata if key.startswith(prefix)}
    found = metadata.get("tokenizer.chat_template") or named
    return _default_template(found, path) if found else None


def _from_folder(folder: Path, chat_template: str | None) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        check_regular(path, MAX_TOKENIZER)
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    files = TokenFiles(
        config=_read_json(folder / "tokenizer_config.json"),
        special_map=_read_json(folder / "special_tokens_map.json"),
        added=_read_json(folder / "added_tokens.json"),
    )
    try:
        complete(backend, files)
        template = chat_template or _chat_template(folder, files.config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} has no usable tokenizer: {error!r}") from error
    return Tokenizer(backend, _special_tokens(files), template)


def _special_tokens(files: TokenFiles) -> dict[str, str]:
    table = files.special_map | files.config
    texts: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        entry = table.get(name)
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str):
            texts[name] = text
    return texts


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The Jinja source of chat_template.jinja, else of tokenizer_config.json, else of
    chat_template.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    legacy = _read_json(folder / "chat_template.json")
    for found in (config.get("chat_template"), legacy.get("chat_template")):
        if found:
            return _default_template(found, folder)
    return None


def _default_template(found: Any, origin: Path) -> str | None:
    """The template to use of one, or of several that have names: the one called `default`, or the
    only one."""
    if isinstance(found, str):
        return found
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if len(found) == 1:
        return str(*found.values())
    if DEFAULT not in found:
        logger.warning(
            "%s: none of the chat templates %s is called %r, so none is used; set "
            "model.chat_template to a file",
            origin,
            ", ".join(map(repr, found)),
            DEFAULT,
        )
        return None
    return str(found[DEFAULT])


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
