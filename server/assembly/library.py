"""The models and draft heads that this machine has: what comes with Aerie, and the hub's cache.
Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafter.source import SHIPPED, shipped_head
from engine.checkpoints.source import BUNDLED_ALIAS, BUNDLED_INSTALL, bundled_gguf

BUNDLED, CACHED = "bundled", "cached"


@dataclass(frozen=True, slots=True)
class Known:
    """One model, or a draft head."""

    source: str  # for `model.source`, or `speculation.draft`
    origin: str  # BUNDLED or CACHED
    form: str  # of its files, for people
    num_bytes: int
    path: Path | None  # None: it can be installed
    note: str = ""


def library() -> list[Known]:
    """All of them, what comes with Aerie first."""
    heads = [_shipped(name, target) for name, target in SHIPPED.items()]
    return [_bundled(), *heads, *_cached()]


def _bundled() -> Known:
    try:
        path = bundled_gguf()
    except FileNotFoundError:
        return Known(BUNDLED_ALIAS, BUNDLED, "gguf", 0, None, f"to have it: {BUNDLED_INSTALL}")
    return Known(BUNDLED_ALIAS, BUNDLED, f"gguf ({path.name})", path.stat().st_size, path)


def _shipped(name: str, target: str) -> Known:
    folder = shipped_head(name)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Known(name, BUNDLED, "draft head, safetensors", size, folder, f"drafts for {target}")


def _cached() -> Iterator[Known]:
    """Models of the hub's cache with weights that can be read, by name."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda each: each.repo_id):
        revisions = sorted(repository.revisions, key=lambda each: each.last_modified)
        if repository.repo_type != "model" or not revisions:
            continue
        yield from _of_snapshot(repository.repo_id, revisions[-1].snapshot_path)


def _of_snapshot(hub_id: str, folder: Path) -> Iterator[Known]:
    for file in sorted(folder.rglob("*.gguf")):
        yield Known(str(file), CACHED, "gguf", file.stat().st_size, file, f"from {hub_id}")
    weights = [path for path in folder.glob("*.safetensors") if path.exists()]
    if weights:
        size = sum(path.stat().st_size for path in weights)
        config = _config(folder)
        yield Known(hub_id, CACHED, _form(config), size, folder, _note(config))
    elif any(folder.glob("*.json")) and not any(folder.rglob("*.gguf")):
        yield Known(hub_id, CACHED, "no weights", 0, folder, f"to have them: aerie pull {hub_id}")


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _form(config: dict[str, Any]) -> str:
    quantised = config.get("quantization_config")
    if isinstance(quantised, dict):
        return f"safetensors, {quantised.get('quant_method', 'quantised')}"
    dtype = config.get("dtype") or config.get("torch_dtype")
    return f"safetensors, {dtype}" if isinstance(dtype, str) else "safetensors"


def _note(config: dict[str, Any]) -> str:
    """The architecture, which says whether Aerie serves it."""
    named = config.get("architectures")
    return ", ".join(map(str, named)) if isinstance(named, list) else ""
