"""Perplexity and divergence of forms of weights, against transformers and known laws."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import accuracy
from benchmarks.accuracy import cut, measures
from benchmarks.tables import markdown
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama

WINDOW = 48


def test_measures_of_two_known_distributions() -> None:
    truth = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    own = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log()
    loss, kl, same = measures(own, truth, [0, 0, 1, 1]).tolist()
    assert loss == pytest.approx(-math.log(0.5) - math.log(0.8))
    assert kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert same == 1


def test_windows_do_not_overlap_and_a_short_text_is_an_error() -> None:
    assert cut(range(7), 3) == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="has 2 tokens; it needs at least 3"):
        cut([1, 2], 3)


def test_the_command_measures_what_transformers_computes(
    tmp_path: Path, native_cache: Path
) -> None:
    model = write_tiny_llama(tmp_path / "tiny", TinyLlama(vocab_size=384))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 12, encoding="utf-8")
    output = tmp_path / "accuracy.json"
    options = ["--model", str(tmp_path / "tiny"), "--text", str(text), "--output", str(output)]
    options += ["--quantised", str(tmp_path / "tiny")]
    more = ["--window", str(WINDOW), "--max-windows", "2", f"files.dir={native_cache}"]
    app = accuracy.typer.Typer()
    app.command()(accuracy.main)
    done = CliRunner().invoke(app, [*options, *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    content = json.loads(output.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in content["rows"]}
    assert rows["float32"]["perplexity"] == pytest.approx(perplexity(model, tmp_path), rel=1e-4)
    assert (rows["float32"]["kl"], rows["float32"]["same_best"]) == (0, 1)
    assert rows["tiny"] == rows["float32"] | {"name": "tiny"}
    assert content["notes"] == ["without llama.cpp: the model is no .gguf file"]
    if "q8" in rows:  # needs native kernels
        assert 0 < rows["plain"]["kl"] < rows["q4"]["kl"]
    assert rows["plain"]["kl"] < rows["plain, fp8 cache"]["kl"] < 0.1
    assert "| float32 |" in markdown("accuracy", content)


def perplexity(model: torch.nn.Module, folder: Path) -> float:
    """Of the second halves of the windows, by transformers."""
    from configs.host import host_config
    from server.text.chat_codec import load_codec

    codec = load_codec(host_config(None, [f"model.source={folder / 'tiny'}"]))
    ids = codec.tokenizer.encode((folder / "text.txt").read_text(encoding="utf-8"), False)
    windows = torch.tensor(cut(ids, WINDOW)[:2])
    with torch.no_grad():
        logits = model(windows).logits.log_softmax(-1)[:, WINDOW // 2 - 1 : -1]
    chosen = logits.gather(2, windows[:, WINDOW // 2 :, None])
    return math.exp(-chosen.mean().item())
