"""The files about GPUs, models and calibration that ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import ConfigError
from configs.planning import load_calibration, load_gpu, shipped_gpus, shipped_heads, shipped_models


def test_shipped_files_are_read() -> None:
    assert list(shipped_gpus()) == ["b200", "h100", "h200"]
    bandwidths = [load_gpu(name).memory_bytes_per_second for name in ("h100", "h200", "b200")]
    assert bandwidths == sorted(bandwidths)
    assert "meta-llama/Llama-4-Scout-17B-16E-Instruct" in shipped_models()
    assert "nvidia/Llama-4-Maverick-17B-128E-Eagle3" in shipped_heads()
    assert 0.5 < load_calibration().memory_share <= 1


def test_any_file_of_a_gpu_can_be_named(tmp_path: Path) -> None:
    text, path = shipped_gpus()["h100"].read_text(encoding="utf-8"), tmp_path / "mine.yaml"
    path.write_text(text.replace("3.35e12", "6.7e12"), encoding="utf-8")
    assert load_gpu(str(path)).memory_bytes_per_second == 6.7e12
    path.write_text(text.replace("3.35e12", "-1"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine.yaml: memory_bytes_per_second: .*greater than 0"):
        load_gpu(str(path))


def test_a_share_above_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("memory_share: 1.2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine.yaml: memory_share: .*less than or equal to 1"):
        load_calibration(path)
