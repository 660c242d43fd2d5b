"""Quantised checkpoints, served over HTTP, give the text of their plain numbers in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.files.quantised_files import (
    FORMATS,
    FP8_CHANNEL,
    llama4_file,
    rewrite,
    separate_experts,
)
from tests.support.models.greedy import greedy_margins
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.models.tiny_llama4 import write_tiny_llama4
from tests.support.servers.live_server import LiveServer

PROMPT = list(range(10, 60)) * 2  # lookup finds repetitions


def llama(folder: Path, name: str) -> Any:
    model = write_tiny_llama(folder, TinyLlama(hidden_size=128))
    rewrite(folder, model, FORMATS[name])
    return model


def llama4(folder: Path) -> Any:
    model = write_tiny_llama4(folder)
    llama4_file(separate_experts(model, FP8_CHANNEL), folder, FP8_CHANNEL)
    return model


CASES: dict[str, Callable[[Path], Any]] = {
    "llama4-fp8": llama4,
    "fbgemm": lambda folder: llama(folder, "fbgemm"),
    "packed-zeros": lambda folder: llama(folder, "packed-zeros"),
    "awq": lambda folder: llama(folder, "awq"),
    "gptq": lambda folder: llama(folder, "gptq"),
}


OFTEN = ("llama4-fp8", "packed-zeros")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.extended) for name in CASES],
)
def test_the_text_is_that_of_the_plain_numbers(
    name: str, tmp_path: Path, native_cache: Path
) -> None:
    oracle = CASES[name](tmp_path)
    with LiveServer(
        f"model.source={tmp_path}",
        "model.served_name=tiny",
        "model.dtype=float32",
        "model.input_bits=16",
        "model.max_model_len=256",
        "cache.num_blocks=64",
        "kernels.threads=2",
        "scheduler.max_num_seqs=8",
        f"files.dir={native_cache}",
    ) as server:
        asked = {
            "model": "tiny",
            "prompt": PROMPT,
            "max_tokens": 48,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        reply = server.post("/v1/completions", asked)
    output = reply.json()["choices"][0]["token_ids"]
    assert len(output) == 48
    assert greedy_margins(oracle, PROMPT, output).min() > 0
