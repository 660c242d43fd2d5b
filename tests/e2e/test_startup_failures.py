"""A server that cannot start prints one line that says why, and ends."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.support.servers.live_server import run_aerie

MXFP4 = gguf.GGMLQuantizationType.MXFP4


def fails(
    *arguments: str, saying: str, extra: dict[str, str] | None = None, prelude: str = ""
) -> None:
    """Assert that the command ends by itself, with one line that matches `saying` and no traceback.
    `prelude` is Python code to run before it."""
    done = run_aerie("serve", *arguments, extra=extra, prelude=prelude)
    lines = done.stderr.splitlines()
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in lines if re.search(saying, line)]) == 1, done.stderr
    assert done.stdout == ""


def test_a_port_in_use(tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fails("--port", f"{port}", saying=f"cannot listen on 127.0.0.1:{port} .*in use")


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (["model.source=/no/such/model"], "no model at '/no/such/model'; a model is"),
        (["model.sourc=x"], "unknown key 'model.sourc'; known here: source, revision"),
        (["models.source=x"], "unknown key 'models'; known here: model, cache"),
        (["model.dtype=float8"], "model.dtype = 'float8'"),
        (["server.api_key_file=/no/keys"], "server.api_key_file /no/keys cannot be read"),
        (["--config", "/no/file.yaml"], "no configuration file '/no/file.yaml'"),
        (
            ["model.source=nobody/nothing"],
            "the hub gave no 'nobody/nothing'.*[^.]\\. With HF_HUB_OFFLINE set, only",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_settings(arguments: list[str], saying: str, tmp_path: Path) -> None:
    cache = {"HF_HOME": str(tmp_path)}
    fails("--port", "0", *arguments, saying=saying, extra=cache)


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: [unclosed\n")
    fails("--config", str(path), saying=r"bad\.yaml cannot be read as YAML")


def test_a_bad_environment_variable() -> None:
    fails(saying="unknown key 'server.prot'", extra={"AERIE_SERVER__PROT": "1"})


def test_an_engine_process_that_cannot_be_spawned(tmp_path: Path, tiny_folder: Path) -> None:
    """The interpreter may be replaced, or lose its permissions, while the server runs."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\n")
    fails(
        *("--port", "0", f"model.source={tiny_folder}"),
        saying=rf"the engine process cannot be started: {program}: Permission denied",
        prelude=f"import sys; sys.executable = {str(program)!r}",
    )


def truncated_weights(folder: Path, tiny_folder: Path) -> Path:
    shutil.copytree(tiny_folder, folder / "model")
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return folder / "model"


def unsupported_gguf(folder: Path, tiny_folder: Path) -> Path:
    """A complete header and tokenizer with one tensor of an unsupported type."""
    model = json.loads((tiny_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    path, tokens = folder / "odd.gguf", sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    values = np.zeros((len(tokens), 64), np.float32)
    writer.add_tensor("token_embd.weight", gguf.quantize(values, MXFP4), raw_dtype=MXFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("craft", "saying"),
    [
        (truncated_weights, r"model\.safetensors is damaged or truncated"),
        (unsupported_gguf, r"token_embd\.weight is MXFP4; supported are"),
    ],
)
def test_weights_that_cannot_be_served(
    craft: Callable[[Path, Path], Path],
    saying: str,
    tmp_path: Path,
    tiny_folder: Path,
    native_cache: Path,
) -> None:
    source = craft(tmp_path, tiny_folder)
    files = f"files.dir={native_cache}"
    fails("--port", "0", f"model.source={source}", files, saying=saying)
