"""The benchmark of answers in lockstep."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.lockstep import asking, report, target_of
from configs.host import host_config
from server.text.chat_codec import load_codec
from tests.support.models.tiny_llama import write_tiny_llama


def test_a_few_rows_answer_the_shipped_prompts(tmp_path: Path, native_cache: Path) -> None:
    write_tiny_llama(tmp_path)
    config = host_config(None, [f"model.source={tmp_path}", f"files.dir={native_cache}"])
    codec = load_codec(config)
    target = target_of(config, codec, rows=4, new=8, prompt=256, steps=1)
    line = report(target, asking(codec), seconds=0.0)
    assert re.search(r"[\d,]+ tokens/s for .* answers of [\d.]+ tokens on average", line)
