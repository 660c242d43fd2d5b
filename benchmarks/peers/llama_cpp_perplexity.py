"""The perplexity of llama.cpp on windows of tokens, by its Python bindings.

Runs as a script in llama-cpp-python's own virtual environment, so it imports nothing of this
project: `python llama_cpp_perplexity.py MODEL.gguf THREADS`. Reads JSON from stdin, lists of token
ids of equal length; the second half of each is scored, as by llama.cpp's own tool. Writes JSON to
stdout: "loss", the mean negative log-likelihood of the scored tokens in nats, and "best", the token
that llama.cpp thought likeliest in the place of each.
"""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np


def scored(model: llama_cpp.Llama, ids: list[int]) -> tuple[float, list[int]]:
    """Of the second half of `ids`: the sum of the loss, and the likeliest tokens."""
    model.reset()
    model.eval(ids)
    first = len(ids) // 2
    logits = np.asarray(model.scores[first - 1 : len(ids) - 1], dtype=np.float64)
    peaks = logits.max(axis=1)
    log_sums = peaks + np.log(np.exp(logits - peaks[:, None]).sum(axis=1))
    loss = float((log_sums - logits[np.arange(len(ids) - first), ids[first:]]).sum())
    return loss, logits.argmax(axis=1).tolist()


def main(path: str, threads: int) -> None:
    windows: list[list[int]] = json.load(sys.stdin)
    length = len(windows[0])
    model = llama_cpp.Llama(
        path,
        n_ctx=length,
        n_batch=length,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )
    loss, best = 0.0, list[int]()
    for ids in windows:
        more, likeliest = scored(model, ids)
        loss, best = loss + more, best + likeliest
    json.dump({"loss": loss / len(best), "best": best}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
