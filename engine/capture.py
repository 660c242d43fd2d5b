"""Writes finished sequences to disk as token ids, in a thread that never delays the engine's steps.

Shards are JSONL files `captured-00000.jsonl`, ... with one object per sequence. A shard is written
as `*.part` and renamed when it is complete, so a file without that suffix is whole. One process
at a time may write to a directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from engine.request import FinishReason, Sequence

QUEUE_SIZE = 256  # sequences that wait for the disk
CLOSING = 1.5  # seconds to write what is still queued
PART = ".part"

logger = logging.getLogger(__name__)


class CapturedSequence(msgspec.Struct, frozen=True):
    """One line of a shard. The first `num_prompt` token ids are the prompt."""

    token_ids: list[int]
    num_prompt: int
    temperature: float


class CaptureWriter:
    """Implements `SequenceSink`. Only the thread that steps the engine calls `take` and `close`."""

    def __init__(
        self, shards: ShardWriter, sample_rate: float, queue_size: int = QUEUE_SIZE
    ) -> None:
        """`shards`: used only by the writing thread. `sample_rate`: share of the sequences."""
        self._shards = shards
        self._sample_rate = sample_rate
        self._queue: queue.Queue[CapturedSequence | None] = queue.Queue(queue_size)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._write, name="capture", daemon=True)
        self._lost = 0  # queued, but not written; only the writing thread counts them
        self._num_refused = 0  # the queue was full, or capturing had stopped
        self.num_captured = 0

    @property
    def num_dropped(self) -> int:
        """Sampled sequences that were not written: the queue was full, or capturing stopped."""
        return self._num_refused + self._lost

    def start(self) -> None:
        self._thread.start()

    def take(self, seq: Sequence, reason: FinishReason) -> None:
        """Queue a finished sequence, if it is sampled and has output. Once capturing has stopped,
        it counts as dropped."""
        if reason is FinishReason.ERROR or seq.num_output == 0:
            return
        if not is_sampled(seq.request_id, self._sample_rate):
            return
        if self._stopped.is_set():
            self._num_refused += 1
            return
        temperature = seq.request.params.temperature
        try:
            self._queue.put_nowait(CapturedSequence(seq.token_ids, seq.num_prompt, temperature))
        except queue.Full:
            self._num_refused += 1
        else:
            self.num_captured += 1

    def close(self) -> None:
        """Write what is still queued, within CLOSING seconds, and complete the last shard."""
        if not self._thread.is_alive():
            return
        try:
            self._queue.put(None, timeout=CLOSING)
        except queue.Full:
            logger.error("captured sequences are lost: the disk is too slow")
            return
        self._thread.join(CLOSING)

    def _write(self) -> None:
        while (captured := self._queue.get()) is not None:
            if self._stopped.is_set():
                self._lost += 1
                continue
            self._write_one(captured)
        self._guarded(self._shards.finish)

    def _write_one(self, captured: CapturedSequence) -> None:
        line = msgspec.json.encode(captured) + b"\n"
        if not self._shards.has_room(len(line)):
            self._guarded(self._shards.finish)
            self._stop(1)
            logger.warning("capturing stops: %s is full (capture.max_bytes)", self._shards.folder)
            return
        self._guarded(lambda: self._shards.write(line, len(captured.token_ids)))

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run `work`; an OSError ends capturing and nothing else."""
        try:
            work()
        except OSError as error:
            self._stop(max(1, self._shards.discard()))  # without a shard, it is the line alone
            logger.error("capturing stops, serving continues: %s", error)

    def _stop(self, num_lost: int) -> None:
        self._lost += num_lost
        self._stopped.set()


class ShardWriter:
    """Shards of one directory. Not thread-safe."""

    def __init__(self, folder: Path, max_bytes: int, shard_tokens: int) -> None:
        """`max_bytes` bounds all shards in the folder, those of earlier runs too. ValueError unless
        files can be made there."""
        self.folder = folder
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._path = folder
        self._num_lines = self._num_tokens = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            known = list(folder.glob("captured-*.jsonl*"))
            self._left = max_bytes - sum(path.stat().st_size for path in known)
        except OSError as error:
            raise ValueError(f"capture.dir {folder} cannot be used: {error}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"capture.dir {folder} cannot be written to")
        self._next = 1 + max((_number(path) for path in known), default=-1)

    def has_room(self, num_bytes: int) -> bool:
        return num_bytes <= self._left

    def write(self, line: bytes, num_tokens: int) -> None:
        """Add a line; complete the shard once it has `shard_tokens`. OSError when that fails."""
        file = self._file or self._open()
        self._num_lines += 1
        self._num_tokens += num_tokens
        self._left -= len(line)
        file.write(line)
        if self._num_tokens >= self._shard_tokens:
            self.finish()

    def finish(self) -> None:
        """Complete the open shard, if there is one. OSError when that fails."""
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._path.with_name(self._path.name + PART).rename(self._path)
        self._file.close()
        self._file = None

    def discard(self) -> int:
        """Delete the open shard, which frees its space; returns how many lines it had."""
        if self._file is None:
            return 0
        part, self._file = self._file, None
        with contextlib.suppress(OSError):  # what was buffered may not fit either
            part.close()
        with contextlib.suppress(OSError):
            self._path.with_name(self._path.name + PART).unlink()
        return self._num_lines

    def _open(self) -> BinaryIO:
        """Open a new shard, numbered after all others, complete or not."""
        self._path = self.folder / f"captured-{self._next:05}.jsonl"
        part = f"{self._path}{PART}"
        number = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(number, "wb")
        self._next += 1
        self._num_lines = self._num_tokens = 0
        return self._file


def is_sampled(request_id: str, rate: float) -> bool:
    """Whether a request belongs to the sampled share `rate`; the same id always gets the same
    answer."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < rate * 2**64


def _number(path: Path) -> int:
    """The number of a shard's file, -1 for other files."""
    digits = path.name.removesuffix(PART).removeprefix("captured-").removesuffix(".jsonl")
    return int(digits) if digits.isdecimal() else -1
