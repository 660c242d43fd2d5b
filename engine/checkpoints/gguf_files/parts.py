"""GGUF models in several files, as `llama-gguf-split` writes them. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from engine.checkpoints.gguf_files.header import GGUFFile, read_gguf

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def gguf_paths(path: Path) -> list[Path]:
    """All files of the model to which the file `path` belongs, in order; the first one holds
    the metadata. FileNotFoundError if one is missing."""
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match[1], int(match[3])
    width = f"of-{match[3]}{path.suffix}"
    paths = [path.with_name(f"{stem}-{number:05}-{width}") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise FileNotFoundError(f"{path} is one of {count} parts; missing: {', '.join(missing)}")
    return paths


def read_parts(path: Path) -> list[GGUFFile]:
    """The header of every file of a model, from the path of its first one. ValueError if the files
    do not belong together."""
    parts = [read_gguf(part) for part in gguf_paths(path)]
    count = parts[0].metadata.get("split.count", 1)
    if count not in (0, len(parts)):
        raise ValueError(
            f"{path} is one of {count} parts, which must have names like "
            f"NAME-00001-of-{count:05}.gguf"
        )
    for number, part in enumerate(parts):
        if len(parts) > 1 and part.metadata.get("split.no") != number:
            found = part.metadata.get("split.no")
            raise ValueError(f"{part.path} has split.no {found}; its name says {number}")
    _check_tensors(parts)
    return parts


def _check_tensors(parts: list[GGUFFile]) -> None:
    names = [name for part in parts for name in part.tensors]
    if len(set(names)) != len(names):
        raise ValueError(f"{parts[0].path}: two of its parts hold a tensor of the same name")
    total = parts[0].metadata.get("split.tensors.count", len(names))
    if total != len(names):
        raise ValueError(f"{parts[0].path}: its parts hold {len(names)} of {total} tensors")
