"""Tokenizers that only transformers can read, converted once and kept on disk."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.files import read_bytes
from engine.checkpoints.gguf_files.header import read_gguf
from engine.checkpoints.source import ModelFiles

CACHE_VERSION = 1
CHECKSUMS = "checksums.json"
MAX_FILE = 2**30  # bytes of one file of a tokenizer
TOKENIZER_PATTERNS = ("*.json", "*.model", "*.jinja", "*.txt")  # merges.txt, vocab.txt

logger = logging.getLogger(__name__)


def converted_folder(files: ModelFiles, cache_dir: Path) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json and chat template of this model.

    Its name is a hash of the model's tokenizer files and the version of transformers. A damaged
    folder is converted again. Where the cache cannot be written to, the folder is a temporary one.
    """
    folder = cache_dir / "tokenizers" / _content_key(files)
    if _is_intact(folder):
        return folder
    try:
        _convert_once(files, cache_dir, folder)
    except OSError as error:
        logger.warning("files.dir cannot be used (%s): the tokenizer is not kept", error)
        folder = Path(tempfile.mkdtemp(prefix="aerie-tokenizer-")) / "tokenizer"
        atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
        _convert(files, folder)
    return folder


def _convert_once(files: ModelFiles, cache_dir: Path, folder: Path) -> None:
    with _alone(cache_dir / "tokenizers.lock"):
        if not _is_intact(folder):
            logger.info("converting the tokenizer of %s; this is done once", files.name)
            _convert(files, folder)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """The processes of a server need the tokenizer at the same time, and converting one can take
    many seconds: one of them does it, the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _content_key(files: ModelFiles) -> str:
    digest = hashlib.sha256()
    digest.update(f"{CACHE_VERSION} {importlib.metadata.version('transformers')}".encode())
    if files.kind == "gguf":
        header = read_gguf(files.path)
        with files.path.open("rb") as file:
            digest.update(file.read(header.header_size) + str(header.size).encode())
    else:
        for path in sorted(p for pattern in TOKENIZER_PATTERNS for p in files.path.glob(pattern)):
            digest.update(path.name.encode() + read_bytes(path, MAX_FILE))
    return digest.hexdigest()[:32]


def _is_intact(folder: Path) -> bool:
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        return bool(checksums) and checksums == _checksums(folder)
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _convert(files: ModelFiles, folder: Path) -> None:
    """Write to a temporary folder, then rename it: readers see a complete folder or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as scratch:
        fresh = Path(scratch) / "tokenizer"
        _save_converted(files, fresh)
        (fresh / CHECKSUMS).write_text(json.dumps(_checksums(fresh)), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            fresh.rename(folder)
        except OSError:  # another process was faster
            if not _is_intact(folder):
                raise


def _save_converted(files: ModelFiles, target: Path) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import logging as their_logging

    their_logging.disable_default_handler()  # the process's own handler writes the log
    their_logging.enable_propagation()
    options = {"gguf_file": files.path.name} if files.kind == "gguf" else {}
    folder = files.path.parent if files.kind == "gguf" else files.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
        tokenizer.save_pretrained(target)
    except Exception as error:  # any failure is a fault of the files
        raise ValueError(f"{files.path}: cannot be converted to a tokenizer: {error}") from error
    if not (target / "tokenizer.json").is_file():
        raise ValueError(f"{files.path}: transformers has no fast tokenizer for it")
