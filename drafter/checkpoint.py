"""Load and save published draft heads."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.schema import AuxLayers
from drafter import manifest, vocab
from drafter.head_files import check_tensors, open_tensors, read_config
from drafter.head_shards import write_tensors
from drafter.heads.building import HeadBuilder, LoadedHead
from drafter.heads.config import AUX_IDS, HeadConfig
from drafter.heads.published import eagle3_json, eagle_json
from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.written import write_json

logger = logging.getLogger(__name__)


def load_head(path: Path, builder: HeadBuilder, aux: AuxLayers = "auto") -> LoadedHead:
    """Load the head in the directory `path` for the target of `builder`, whose embedding and LM
    head it shares where it has none of its own, or the same; `aux` as in `read_head_config`. Raises
    ValueError that names the file, and the tensor or the key at fault.
    """
    target, max_len = builder.target.arch, builder.max_len
    config = read_head_config(path, target, aux)
    found = open_tensors(path)
    check_tensors(manifest.head_tensors(config, target, found), found, path)
    _warn(path, config, target, max_len)
    try:
        return builder.build(config, found.keys(), found.__getitem__)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _warn(path: Path, config: HeadConfig, target: LlamaArch, max_len: int) -> None:
    """Log what was decided without the configuration, or against it."""
    named, stored = HeadConfig.from_json(read_config(path)).arch.num_layers, config.arch.num_layers
    if named != stored:
        logger.warning(
            "%s: num_hidden_layers is %d, but the files hold %d: the head has %d",
            path / "config.json",
            named,
            stored,
            stored,
        )
    if config.kind != "eagle" and config.use_aux and not config.guesses_taps:
        places = list(config.aux_layers or ())
        logger.info("%s: the head reads the target after %s layers", path.name, places)
    if config.guesses_taps:
        logger.warning(
            "%s names no target layers (%s): the usual ones, %s, are read. If few drafted tokens "
            "are accepted, add the ids that the head was trained with",
            path / "config.json",
            AUX_IDS,
            list(config.tap_layers(target)),
        )
    if max_len > config.arch.max_position_embeddings:
        logger.warning(
            "%s was trained for %d positions and will draft at up to %d: expect fewer accepted "
            "tokens after them",
            path,
            config.arch.max_position_embeddings,
            max_len,
        )


def read_head_config(path: Path, target: LlamaArch, aux: AuxLayers = "auto") -> HeadConfig:
    """The checked configuration of the head in the directory `path`; ValueError unless it fits
    `target`. `aux`: what its ids of target layers mean, or these layers. Reads no weights."""
    content = read_config(path)
    try:
        config = HeadConfig.from_json(content, aux)
        _check_fits(config, target)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from error
    return _with_stored_layers(config, path)


def _with_stored_layers(config: HeadConfig, path: Path) -> HeadConfig:
    """The configuration with as many layers as the files hold, if they are here: some trainers
    copy num_hidden_layers from the target."""
    stored = manifest.num_layers(open_tensors(path)) if any(path.glob("*.safetensors")) else 0
    if stored == 0:
        return config
    return dataclasses.replace(config, arch=dataclasses.replace(config.arch, num_layers=stored))


def _check_fits(config: HeadConfig, target: LlamaArch) -> None:
    for name, own, wanted in (
        ("hidden_size", config.target_hidden_size, target.hidden_size),
        ("vocab_size", config.arch.vocab_size, target.vocab_size),
    ):
        if own != wanted:
            raise ValueError(f"the head is for a target of {name} {own}, this one has {wanted}")
    config.tap_layers(target)


def save_eagle3(
    path: Path,
    config: HeadConfig,
    target: LlamaArch,
    tensors: Mapping[str, Tensor],
    target_ids: Tensor | None,
    max_shard_bytes: int | None = None,
) -> None:
    """Write an EAGLE-3 head that this package and other engines can load: config.json and weights
    under the published names.

    Args:
        path: A directory that does not exist yet; it appears complete or not at all.
        tensors: By common name (`manifest.common_name`), without d2t and t2d.
        target_ids: [Vd] int64, target id of each draft id; None if they are equal.
        max_shard_bytes: Limit of each file of weights; None: all weights in model.safetensors.
    """
    content = eagle3_json(config, target)
    ids = torch.arange(config.draft_vocab_size) if target_ids is None else target_ids.cpu()
    offsets = vocab.offsets_of(ids)
    vocab.target_ids_of(offsets, target.vocab_size)  # refuses ids that could not be loaded
    mapping = {manifest.D2T: offsets, manifest.T2D: vocab.mask_of(ids, target.vocab_size)}
    stored = {manifest.published_name(name): each for name, each in {**tensors, **mapping}.items()}
    _save(path, config, target, content, stored, max_shard_bytes)


def save_eagle(
    path: Path,
    config: HeadConfig,
    target: LlamaArch,
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int | None = None,
) -> None:
    """Write an EAGLE head, or a dense one (with all norms), as `save_eagle3` does."""
    config = dataclasses.replace(config, fc_bias=manifest.FC_BIAS in tensors)
    _save(path, config, target, eagle_json(config, target), tensors, max_shard_bytes)


def _save(
    path: Path,
    config: HeadConfig,
    target: LlamaArch,
    content: dict[str, Any],
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int | None,
) -> None:
    """Write `content` as config.json, and `tensors`, which have their names in the files."""
    if path.exists():
        raise FileExistsError(f"{path} exists already; heads are not overwritten")
    _check_fits(config, target)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        folder = Path(scratch) / "head"
        folder.mkdir()
        write_json(folder / "config.json", content)
        write_tensors(folder, stored, max_shard_bytes)
        found = open_tensors(folder)
        check_tensors(manifest.head_tensors(config, target, found), found, folder)
        folder.rename(path)
