"""`aerie models` and `aerie pull`, against a stand-in for the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from huggingface_hub import constants
from typer.testing import CliRunner

from engine.checkpoints import hub, source
from server.cli import app
from tests.support.files.hub import HUB_ID, Hub, stand_in_hub
from tests.support.waiting import DEADLINE

CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}).encode()
WEIGHTS = bytes(range(256)) * 400
FILES = {
    "config.json": CONFIG,
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle",
    "README.md": b"# About",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's library, which may ask a hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", DEADLINE)
    for module in (hub, source):
        monkeypatch.setattr(module, "HUB_TIMEOUT", DEADLINE)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", len(WEIGHTS) // 8)
    return tmp_path / "hub"


def run(*arguments: str, hub: Hub | None = None) -> Result:
    """A command in this process; without a hub, none answers."""
    url = "http://127.0.0.1:1" if hub is None else hub.url
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return CliRunner().invoke(app, list(arguments))


def test_pull_goes_on_where_it_was_interrupted_and_models_lists_it(cache: Path) -> None:
    with stand_in_hub(FILES, broken={"model.safetensors"}) as hub:
        done = run("pull", HUB_ID, hub=hub)
        assert done.exit_code == 0, done.stderr
        again = run("pull", HUB_ID, hub=hub)
    assert done.stdout == f"aerie serve model.source={HUB_ID}\n"
    assert f"{HUB_ID} at cccccccccccc: 2 files, 0.1 MB, 0.1 MB to fetch\n" in done.stderr
    assert "all of it fetched before" in again.stderr
    assert hub.starts["model.safetensors"] == [0, len(WEIGHTS) // 2]
    assert set(hub.starts) == {"config.json", "model.safetensors"}  # no pickle, no text
    (path,) = cache.glob("models--*/snapshots/*/model.safetensors")
    assert path.read_bytes() == WEIGHTS

    listed = run("models", "--json")
    found = {each["source"]: each for each in map(json.loads, listed.stdout.splitlines())}
    assert {"smollm2-135m-instruct", "smollm2-135m-instruct-eagle3", HUB_ID} == set(found)
    assert found[HUB_ID] == {
        "source": HUB_ID,
        "origin": "cached",
        "form": "safetensors, bfloat16",
        "num_bytes": len(WEIGHTS),
        "path": str(path.parent),
        "note": "LlamaForCausalLM",
    }
    assert "bundled, " in run("models").stdout


def test_pull_fetches_one_gguf_file_and_refuses_what_cannot_be(cache: Path) -> None:
    ggufs = {"a-Q4_K_M.gguf": b"GGUF", "a-Q8_0.gguf": b"GGUF"}
    with stand_in_hub(ggufs) as hub:
        unsure = run("pull", HUB_ID, hub=hub)
        done = run("pull", HUB_ID, "--include", "*Q4_K_M.gguf", hub=hub)
        wrong = run("pull", HUB_ID, "--include", "*Q2_K.gguf", hub=hub)
    with stand_in_hub(FILES) as hub:
        hub.sizes["model.safetensors"] = 10**18
        too_big = run("pull", HUB_ID, hub=hub)
        unknown = run("pull", "org/other", hub=hub)
    offline = run("pull", HUB_ID)
    assert (unsure.exit_code, wrong.exit_code) == (2, 2)
    assert "choose with --include: a-Q4_K_M.gguf, a-Q8_0.gguf" in unsure.stderr
    assert "has no file *Q2_K.gguf; it holds a-Q4_K_M.gguf" in wrong.stderr
    (path,) = cache.glob("models--*/snapshots/*/*.gguf")
    assert done.stdout == f"aerie serve model.source={path}\n"
    assert "needs 1000000000.0 GB more" in too_big.stderr
    assert "set HF_HOME" in too_big.stderr
    for failed in (unknown, offline):
        assert failed.exit_code == 2
        assert failed.stderr.startswith("aerie: the hub gave no 'org/")
        assert len(failed.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["name", "a/b/c", "../etc/passwd", ""])
def test_pull_wants_a_hub_id(cache: Path, name: str) -> None:
    done = run("pull", name)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "is no hub id such as 'org/name'" in done.stderr
