"""The physical limit: a decode step cannot be faster than reading all weights once."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from engine.checkpoints.checkpoint import Checkpoint
from engine.checkpoints.manifest import expected_tensors

REPEATS = 15


def read_seconds(num_bytes: int, threads: int) -> float:
    """Seconds that `threads` threads need to read `num_bytes` once (median of `REPEATS`). The reads
    repeat from the same place, as decoding reads its weights, so caches help."""
    parts = np.array_split(np.ones(num_bytes // 8, dtype=np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.max, parts))  # touch the pages, start the threads
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def weight_bytes(checkpoint: Checkpoint, itemsize: int) -> int:
    """Bytes of all weights that a decode step reads. A tied embedding is read once, as the LM head;
    an untied one does not count, since only single rows of it are read."""
    arch = checkpoint.arch
    shapes = expected_tensors(arch)
    if not arch.tie_word_embeddings:
        shapes = {n: s for n, s in shapes.items() if n != "model.embed_tokens.weight"}
    return sum(int(np.prod(shape)) for shape in shapes.values()) * itemsize
