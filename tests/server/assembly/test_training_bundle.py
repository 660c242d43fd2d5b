"""What a machine without network gets to train with: in parts, and a command that runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.heads.training_commands import arguments, write_model_and_data

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "training_bundle.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_bundle", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_source(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a part of the source, which is packed faster."""
    monkeypatch.setattr(script, "SOURCE", ("aerie.py", "configs"))


def joined(parts: list[Path], folder: Path) -> None:
    """As `cat part-* | tar x` does, and the first lines of run.sh."""
    whole = folder / "whole.tar"
    whole.write_bytes(b"".join(part.read_bytes() for part in sorted(parts)))
    for path in (whole, folder / "small.tar.xz"):
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")


@pytest.mark.usefixtures("tiny_source")
def test_the_parts_are_bounded_and_hold_everything(script: ModuleType, tmp_path: Path) -> None:
    files = {"model.gguf": os.urandom(200_000), "prompts.jsonl": b'{"turns": ["a"]}\n'}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    site = tmp_path / "packages"
    (site / "one" / "__pycache__").mkdir(parents=True)
    (site / "one" / "__init__.py").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-99").touch()  # of an earlier bundle
    parts = script.write_bundle(
        tmp_path / "out", tmp_path / "model.gguf", tmp_path / "prompts.jsonl", site, 90_000
    )
    assert sorted(parts) == sorted((tmp_path / "out").iterdir())
    assert [part.stat().st_size == 90_000 for part in parts] == [True] * (len(parts) - 1) + [False]
    joined(parts, tmp_path / "out")
    assert all((tmp_path / "out" / name).read_bytes() == files[name] for name in files)
    assert (tmp_path / "out/source/configs/train/smollm2-eagle3-gpu.yaml").exists()
    assert [path.name for path in (tmp_path / "out/site/one").iterdir()] == ["__init__.py"]
    assert not list((tmp_path / "out/source").rglob("__pycache__"))


@pytest.mark.extended
def test_a_bundle_trains_a_head_from_its_own_files(
    script: ModuleType, tmp_path: Path, native_cache: Path
) -> None:
    folder = write_model_and_data(tmp_path / "made")
    parts = script.write_bundle(
        tmp_path / "there", folder / "model", folder / "prompts.jsonl", None, script.PART_BYTES
    )
    joined(parts, tmp_path / "there")
    own = ("model.source", "data.conversations", "run.output", "run.steps")
    given = [
        each
        for each in arguments(folder, native_cache, tmp_path, data__rows=4, data__max_tokens=128)
        if not each.startswith(own)
    ]
    environment = os.environ | {"OUT": str(tmp_path / "got"), "PYTHON": sys.executable}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["sh", "run.sh", "0.02", *given, "head.init=target"],
        cwd=tmp_path / "there",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "got/head/config.json").exists()
    assert (tmp_path / "got/run/time.json").exists()
