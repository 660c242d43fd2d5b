"""The perplexity of llama.cpp on windows of tokens, by the server of the wheel xllamacpp.

Runs as a script in xllamacpp's own virtual environment, so it imports nothing of this project:
`python xllamacpp_perplexity.py MODEL.gguf THREADS`. Input and output are those of
llama_cpp_perplexity.py. The server tells probabilities of the next token only, so every scored
token is a request; its prompt is in the cache.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any

import xllamacpp

USUAL = 1000  # the likeliest tokens to ask for; all of them take half a second to send


def served(path: str, threads: int, length: int) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.port, params.hostnames = 0, ["127.0.0.1"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel, params.n_ctx = 1, length
    return xllamacpp.Server(params)


def next_token(url: str, ids: list[int], count: int) -> dict[int, float]:
    """Log-probabilities of the `count` likeliest tokens after `ids`, the likeliest first."""
    body = {"prompt": ids, "n_predict": 1, "n_probs": count, "cache_prompt": True}
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        answer: dict[str, Any] = json.load(response)
    top = answer["completion_probabilities"][0]["top_logprobs"]
    return {each["id"]: each["logprob"] for each in top}


def main(path: str, threads: int) -> None:
    windows: list[list[int]] = json.load(sys.stdin)
    server = served(path, threads, 2 * len(windows[0]))
    loss, best = 0.0, []
    for ids in windows:
        for end in range(len(ids) // 2, len(ids)):
            found = next_token(server.listening_address, ids[:end], USUAL)
            best.append(next(iter(found)))
            if ids[end] not in found:
                found = next_token(server.listening_address, ids[:end], 10**6)
            loss -= found[ids[end]]
    json.dump({"loss": loss / len(best), "best": best}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
