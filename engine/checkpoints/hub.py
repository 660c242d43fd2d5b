"""Fetches a model from the hub ahead of its first use. Imports no torch."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints.source import HUB_ID, HUB_PATTERNS, HUB_TIMEOUT, asking_hub

GIGABYTE = 10**9
SPARE = 50_000_000  # bytes of a disk that stay free
MAX_LISTED = 12  # files in a message


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository, with its size in bytes; `cached`: it was fetched before."""

    name: str
    size: int
    cached: bool


@dataclass(frozen=True, slots=True)
class HubModel:
    """What of a repository is to be fetched."""

    hub_id: str
    commit: str
    files: tuple[HubFile, ...]

    @property
    def missing_bytes(self) -> int:
        return sum(file.size for file in self.files if not file.cached)


def pull(
    hub_id: str,
    revision: str | None = None,
    patterns: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """Fetch the files of a model into the hub's cache, where `aerie serve` finds them, and return
    the directory. What an interrupted call has left is used.

    Args:
        patterns: of file names, as `*Q4_K_M.gguf`; default: what a model of safetensors needs.
        say: gets a line before the download begins.

    Raises:
        ValueError: no hub id, or the repository has no such files.
        OSError: the hub does not answer, or the disk has too little room; says what to do.
    """
    if not HUB_ID.fullmatch(hub_id):
        raise ValueError(f"{hub_id!r} is no hub id such as 'org/name'")
    model = find(hub_id, revision, patterns)
    cache = cache_folder()
    missing = model.missing_bytes
    free = free_bytes(cache)
    if missing + SPARE > free:
        raise OSError(
            f"{hub_id} needs {sized(missing)} more, and {cache} has {sized(free)} free: make room, "
            "or set HF_HOME to a folder on a larger disk"
        )
    size = sized(sum(file.size for file in model.files))
    to_fetch = f"{sized(missing)} to fetch" if missing else "all of it fetched before"
    say(f"{hub_id} at {model.commit[:12]}: {len(model.files)} files, {size}, {to_fetch}")
    return _fetch(model)


def find(hub_id: str, revision: str | None = None, patterns: Sequence[str] = ()) -> HubModel:
    """What `pull` fetches. Raises as it does."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    with asking_hub(hub_id, revision):
        info = HfApi().model_info(
            hub_id, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT
        )
    commit = str(info.sha)
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
    wanted = _chosen(hub_id, sorted(sizes), patterns)
    cached = {
        name: isinstance(try_to_load_from_cache(hub_id, name, revision=commit), str)
        for name in wanted
    }
    files = tuple(HubFile(name, sizes[name], cached[name]) for name in wanted)
    return HubModel(hub_id, commit, files)


def _chosen(hub_id: str, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """ValueError, naming what there is, if that is no model."""
    found = [
        name
        for name in names
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns or HUB_PATTERNS)
    ]
    weights = [name for name in found if name.endswith((".safetensors", ".gguf"))]
    if found and (patterns or weights):
        return found
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs and not patterns:
        raise ValueError(f"{hub_id} holds .gguf files; choose with --include: {_listed(ggufs)}")
    wanted = ", ".join(patterns) or "*.safetensors (pickled weights are not fetched)"
    raise ValueError(f"{hub_id} has no file {wanted}; it holds {_listed(names) or 'nothing'}")


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + rest


def _fetch(model: HubModel) -> Path:
    from huggingface_hub import snapshot_download

    names = [file.name for file in model.files]
    with asking_hub(model.hub_id, model.commit):
        folder = snapshot_download(
            model.hub_id, revision=model.commit, allow_patterns=names, etag_timeout=HUB_TIMEOUT
        )
    return Path(folder)


def cache_folder() -> Path:
    """Where the hub's files are kept (HF_HOME moves it)."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def free_bytes(folder: Path) -> int:
    """Of the disk that will hold `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def sized(num_bytes: int) -> str:
    """For people: 0.3 MB, 271 MB, 16.1 GB."""
    if num_bytes >= GIGABYTE:
        return f"{num_bytes / GIGABYTE:.1f} GB"
    megabytes = num_bytes / 10**6
    return f"{megabytes:.0f} MB" if megabytes >= 10 else f"{megabytes:.1f} MB"
