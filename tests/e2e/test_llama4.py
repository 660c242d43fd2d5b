"""A tiny Llama 4 over HTTP, on two ranks and with drafts, gives the text of transformers."""

from __future__ import annotations

from pathlib import Path

from tests.support.heads.tiny_heads import write_tiny_llama4_head
from tests.support.models.greedy import greedy_margins
from tests.support.models.tiny_llama4 import write_tiny_llama4
from tests.support.servers.live_server import LiveServer
from tests.support.waiting import DEADLINE

PROMPT = list(range(10, 60)) * 2  # lookup finds repetitions


def test_a_llama4_is_served_with_drafts_on_two_ranks(tmp_path: Path, native_cache: Path) -> None:
    (tmp_path / "model").mkdir()
    oracle = write_tiny_llama4(tmp_path / "model")
    head = write_tiny_llama4_head(tmp_path / "head", oracle)
    with LiveServer(
        f"model.source={tmp_path / 'model'}",
        "model.served_name=tiny",
        "model.dtype=float32",
        "model.max_model_len=256",
        "cache.num_blocks=64",
        "kernels.threads=2",
        "parallel.tensor=2",
        f"parallel.timeout={DEADLINE}",
        "parallel.experts=expert",
        "scheduler.max_num_seqs=8",
        "scheduler.max_num_batched_tokens=61",
        f"speculation.draft={head}",
        "speculation.tree=chain3",
        f"files.dir={native_cache}",
    ) as server:
        asked = {
            "model": "tiny",
            "prompt": PROMPT,
            "max_tokens": 64,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        reply = server.post("/v1/completions", asked)
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
        refused = server.post(
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": [picture]}]},
        )
        drafts = server.metrics()["spec_decode_num_drafts_total"]
        assert server.stop() == 0
    output = reply.json()["choices"][0]["token_ids"]
    assert len(output) == 64
    assert greedy_margins(oracle, PROMPT, output).min() > 0
    assert drafts > 0
    assert refused.status_code == 400
