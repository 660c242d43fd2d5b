"""The parts of the engine's benchmark that run without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import engine as gpu_engine
from kernels.ops import Ops


def test_every_head_of_the_benchmark_has_a_folder_of_its_own(
    tmp_path: Path, reference_ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []

    def save(folder: Path, *_: object) -> None:
        folder.mkdir()  # raises if a head would overwrite another
        saved.append(folder)

    class Loader:
        def __init__(self, *_: object) -> None: ...

        def load(self, folder: Path) -> Path:
            return folder

    monkeypatch.setattr(gpu_engine, "random_eagle3", lambda *_, **__: {})
    monkeypatch.setattr(gpu_engine, "save_eagle3", save)
    monkeypatch.setattr(gpu_engine, "HeadLoader", Loader)
    large = gpu_engine.Large(reference_ops, torch.device("cpu"), tmp_path)
    target: Any = None
    for _ in range(2):
        large.head(target)
    assert len(set(saved)) == 2
