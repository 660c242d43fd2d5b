"""`aerie quantize` on a tiny model, as its users run it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from typer.testing import CliRunner

from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.source import ModelFiles
from engine.models.families import load_target
from engine.models.place import Place
from engine.quantising import files
from kernels.ops import Ops
from server.cli import app
from tests.support.machine.threads import own_torch_threads
from tests.support.models.packed import CPU, PackedModel, whole
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.models.tiny_llama4 import write_tiny_llama4

WORDS = "a server answers the quick brown fox, and never loses a lazy dog at once. " * 20
SPEC = TinyLlama(hidden_size=96, intermediate_size=256, attention_bias=True)


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    with own_torch_threads():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantising")
    (path / "model").mkdir()
    write_tiny_llama(path / "model", SPEC)
    (path / "text.txt").write_text(WORDS, encoding="utf-8")
    return path


def quantize(folder: Path, *words: str) -> Result:
    given = [f"model.source={folder / 'model'}", f"files.dir={folder}", "kernels.backend=reference"]
    return CliRunner().invoke(app, ["quantize", *words, *given])


def text_windows(folder: Path) -> tuple[str, ...]:
    return ("--text", str(folder / "text.txt"), "--window", "64", "--max-windows", "5")


def logits(path: Path, ops: Ops) -> Tensor:
    checkpoint = open_checkpoint(ModelFiles("hf", path, "tiny"))
    model = load_target(checkpoint.arch, checkpoint.stored, Place(ops, torch.float32, CPU), 64)
    ids = Tokenizer.from_file(str(path / "tokenizer.json")).encode(WORDS).ids[:44]
    (found,) = PackedModel(model, ops, torch.float32).run(whole(0, ids, [1, 2, 3]))
    return found


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_a_quantised_model_is_read_and_nearer_than_one_rounded_to_the_nearest(
    form: str, folder: Path, reference_ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SHARD_BYTES", 50_000)
    fitted, nearest = folder / form, folder / f"{form}-nearest"
    done = quantize(folder, "--to", form, "--output", str(fitted), *text_windows(folder))
    assert (done.exit_code, done.stdout) == (0, f"aerie serve model.source={fitted}\n"), done.output
    assert "5 texts of 64 tokens, on cpu" in done.stderr
    assert "layer 2 of 2" in done.stderr
    done = quantize(folder, "--to", form, "--output", str(nearest), "--nearest")
    assert done.exit_code == 0, done.output
    plain = logits(folder / "model", reference_ops)
    errors = [(logits(path, reference_ops) - plain).square().mean() for path in (fitted, nearest)]
    assert errors[0] < errors[1] < 0.2 * plain.var()
    assert (fitted / "model.safetensors.index.json").is_file()
    assert (fitted / "tokenizer.json").read_bytes() == (
        folder / "model" / "tokenizer.json"
    ).read_bytes()


def test_the_configuration_says_which_groups_weights_have(folder: Path) -> None:
    done = quantize(folder, "--to", "int4", "--output", str(folder / "groups"), "--nearest")
    assert done.exit_code == 0, done.output
    config = json.loads((folder / "groups" / "config.json").read_text(encoding="utf-8"))
    found = config["quantization_config"]
    groups = {each["weights"]["group_size"]: each for each in found["config_groups"].values()}
    assert {32, 128} <= set(groups)
    assert "model.layers.1.mlp.down_proj" in groups[128]["targets"]
    assert (found["format"], found["ignore"]) == ("pack-quantized", ["lm_head"])
    assert config["hidden_size"] == 96


def test_what_cannot_be_quantised_is_one_line(folder: Path, tmp_path: Path) -> None:
    def message(*words: str) -> str:
        done = quantize(folder, *words)
        assert (done.exit_code, done.stdout) == (2, "")
        return done.stderr

    out = ("--to", "fp8", "--output", str(tmp_path / "out"))
    assert "text.txt exists already" in message(
        "--to", "fp8", "--output", str(folder / "text.txt"), "--nearest"
    )
    (tmp_path / "short").write_text("hello", encoding="utf-8")
    assert "a window takes 512" in message(*out, "--text", str(tmp_path / "short"))
    assert "the model was made for 512 tokens" in message(*out, "--window", "513")
    assert "nothing" in message(*out, "--text", str(tmp_path / "nothing"))
    (tmp_path / "short").write_bytes(b"caf\xe9")
    assert "short is not UTF-8: byte 0xe9 at 3" in message(*out, "--text", str(tmp_path / "short"))
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    link = ("--to", "fp8", "--output", str(tmp_path / "link"), "--nearest")
    assert "link exists already" in message(*link)
    write_tiny_llama4(tmp_path)
    other = f"model.source={tmp_path}"
    done = CliRunner().invoke(app, ["quantize", *out, other])
    assert "is no LlamaForCausalLM; only these can be quantised here" in done.stderr
    write_tiny_llama(tmp_path, TinyLlama(hidden_size=72))
    done = CliRunner().invoke(app, ["quantize", "--to", "int4", "--output", out[3], other])
    assert "72 inputs do not divide into groups of 32" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("broken", "how", "what"),
    [
        (torch.nan, "nearest", "layers.1.mlp.up_proj.weight has"),
        (torch.nan, "fitted", "layers.1.mlp.gate_proj.weight has"),
        (1e30, "fitted", "what model.layers.1.mlp.down_proj.weight reads has"),
    ],
)
def test_numbers_without_a_size_are_one_line(
    broken: float, how: str, what: str, folder: Path, tmp_path: Path
) -> None:
    write_tiny_llama(tmp_path, SPEC)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(broken)
    save_file(tensors, weights)
    words = ("--nearest",) if how == "nearest" else text_windows(folder)
    output = ("--to", "fp8", "--output", str(tmp_path / "out"))
    source = (f"model.source={tmp_path}", "kernels.backend=reference")
    done = CliRunner().invoke(app, ["quantize", *output, *words, *source])
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert f"{what} numbers that are infinite or not a number" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_quantised_model_is_not_quantised_again(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done = quantize(folder, "--to", "fp8", "--output", str(first), "--nearest")
    assert done.exit_code == 0, done.output
    words = ["--to", "int4", "--output", str(second), f"model.source={first}"]
    done = CliRunner().invoke(app, ["quantize", *words])
    assert "is quantised already; name the model it was made from" in done.stderr
