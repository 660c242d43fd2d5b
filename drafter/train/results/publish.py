"""Write trained tensors to a directory that other engines can load, with its model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from drafter.checkpoint import save_eagle, save_eagle3
from drafter.heads.config import HeadConfig
from drafter.train.results.model_card import ModelCard
from engine.checkpoints.arch import LlamaArch

MAX_SHARD_BYTES = 16_000_000
HEAD_FILES = ("config.json", "README.md", "*.safetensors", "*.safetensors.index.json")


def publish(
    path: Path,
    config: HeadConfig,
    target: LlamaArch,
    tensors: Mapping[str, Tensor],
    target_ids: Tensor | None,
    card: ModelCard,
    *,
    replace: bool = False,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
) -> None:
    """Write the head in bfloat16, and README.md beside it.

    After any error `path` holds what it held before. With `replace`, two renames exchange an
    existing directory: at any moment `path` is a complete head, or does not exist.

    Args:
        tensors: By common name, of any floating dtype, without d2t and t2d.
        target_ids: [Vd] int64, target id of each draft id; None if they are equal.
        max_shard_bytes: Limit of each file of weights; None: all weights in one file.

    Raises:
        FileExistsError: `path` exists, and `replace` is not set or `path` is not a head.
        ValueError: weights are not finite, do not fit `config` and `target`, or do not fit into
            files of `max_shard_bytes`.
        OSError: the head cannot be written; nothing half-written remains.
    """
    if path.exists():
        _check_can_go(path, replace=replace)
    stored = {name: _rounded(name, tensor) for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        folder = Path(scratch) / "new"
        if config.like_eagle3:
            save_eagle3(folder, config, target, stored, target_ids, max_shard_bytes)
        elif target_ids is None:
            save_eagle(folder, config, target, stored, max_shard_bytes)
        else:
            raise ValueError("target_ids is set, but an 'eagle' head has the target's vocabulary")
        (folder / "README.md").write_text(card.render(), encoding="utf-8")
        _put(folder, path, Path(scratch) / "old")


def _check_can_go(path: Path, *, replace: bool) -> None:
    """A wrong path must not destroy a training run or a home directory, so only a head can go."""
    if not replace:
        raise FileExistsError(f"{path} exists already; --replace puts the new head there")
    if not path.is_dir():
        raise FileExistsError(f"{path} is no directory, and only a head can be replaced")
    for entry in path.iterdir():
        if not entry.is_file() or not any(entry.match(pattern) for pattern in HEAD_FILES):
            raise FileExistsError(
                f"{path} holds {entry.name}, which is not of a head ({', '.join(HEAD_FILES)}), and "
                "only a head can be replaced"
            )


def _rounded(name: str, tensor: Tensor) -> Tensor:
    """The tensor in bfloat16. ValueError if a value is not finite, or overflows by rounding."""
    rounded = tensor.detach().to("cpu", torch.bfloat16)
    if not bool(rounded.isfinite().all()):
        bad = int((~rounded.isfinite()).sum())
        raise ValueError(f"tensor {name}: {bad} of {tensor.numel()} values are not finite")
    return rounded


def _put(new: Path, path: Path, old: Path) -> None:
    """Rename `new` to `path`. An existing `path` moves to `old`, and back if that fails."""
    if not path.exists():
        new.rename(path)
        return
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
