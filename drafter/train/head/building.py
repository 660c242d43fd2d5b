"""Build a network with its first weights from a training configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from configs.training import HeadSettings
from drafter import manifest, vocab
from drafter.checkpoint import read_head_config
from drafter.head_files import check_tensors, open_tensors
from drafter.heads.config import HeadConfig, Kind
from drafter.heads.published import NORMS
from drafter.heads.untrained import eagle3_config, random_tensors
from drafter.source import SHIPPED, shipped_head
from drafter.train.head.initial import deepened, weights_from_target
from drafter.train.head.network import DraftNetwork, Eagle3Network, EagleNetwork, PEagleNetwork
from engine.checkpoints.arch import LlamaArch
from engine.models.loading import ReadTensor

FROM_TARGET, RANDOM = "target", "random"


@dataclasses.dataclass(frozen=True, slots=True)
class TargetTensors:
    """The target's shape and weights, unpacked."""

    arch: LlamaArch
    read: ReadTensor

    @property
    def embedding(self) -> Tensor:
        """[V, H]"""
        return self.read("model.embed_tokens.weight")

    @property
    def lm_head(self) -> Tensor:
        """[V, H]"""
        return self.embedding if self.arch.tie_word_embeddings else self.read("lm_head.weight")


def head_config(settings: HeadSettings, target: LlamaArch) -> HeadConfig:
    """The head that `settings` describe, or the published head that they train further. ValueError
    if the head does not fit the target, or the published head does not match the settings."""
    if settings.init not in (FROM_TARGET, RANDOM):
        return published_config(settings, target)
    size = settings.draft_vocab_size
    if size is not None and size > target.vocab_size:
        raise ValueError(
            f"head.draft_vocab_size {size} must be at most {target.vocab_size}, the target's"
        )
    config = eagle3_config(target, size, settings.num_layers)
    width = settings.intermediate_size or target.intermediate_size
    arch = dataclasses.replace(config.arch, intermediate_size=width)
    kind: Kind = settings.kind if settings.kind in ("eagle3", "peagle") else "eagle"
    config = dataclasses.replace(
        config,
        kind=kind,
        arch=arch,
        fc_bias=False,
        aux_layers=settings.aux_layers,
        mask_token_id=_mask_token(settings, target),
    )
    config.tap_layers(target)
    return config


def _mask_token(settings: HeadSettings, target: LlamaArch) -> int | None:
    if settings.kind != "peagle":
        return None
    given = settings.mask_token_id
    return target.vocab_size - 1 if given is None else given


def build_network(
    settings: HeadSettings,
    config: HeadConfig,
    target: TargetTensors,
    target_ids: Tensor | None,
    max_len: int,
    dtype: torch.dtype,
    seed: int,
) -> DraftNetwork:
    """A network with its first weights. `dtype`: type of the target's frozen rows; `max_len`:
    positions that are trained.

    Raises:
        ValueError: head.init does not fit the head.
    """
    embedding = target.embedding.to(dtype)
    network: DraftNetwork
    if config.like_eagle3:
        kind = PEagleNetwork if config.kind == "peagle" else Eagle3Network
        network = kind(config, embedding, max_len)
    else:
        head, dense = target.lm_head.to(dtype), settings.kind == "dense"
        network = EagleNetwork(config, embedding, head, max_len, dense)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    weights = random_tensors(shapes, seed)
    if settings.init == FROM_TARGET:
        weights = weights_from_target(weights, config, target.arch, target.read, target_ids)
    elif settings.init != RANDOM:
        given = published_weights(published_path(settings), config, target)
        if config.kind == "peagle":  # an EAGLE-3 head has none
            given.setdefault(manifest.MASK_HIDDEN, weights[manifest.MASK_HIDDEN])
        weights = deepened(given, weights, config, target.arch, target.read)
    network.load_state_dict(weights)
    return network


def published_config(settings: HeadSettings, target: LlamaArch) -> HeadConfig:
    """The configuration of the head in the directory `settings.init`. ValueError if the head does
    not match the other settings, or cannot be trained."""
    path = published_path(settings)
    found, config = open_tensors(path), read_head_config(path, target)
    check_tensors(manifest.head_tensors(config, target, found), found, path)
    dense = config.kind == "eagle" and manifest.FINAL_NORM in found
    for option in NORMS:
        if getattr(config, option):
            raise ValueError(f"head.init {path} has {option}; heads with it cannot be trained")
    if not config.use_aux:
        raise ValueError(f"head.init {path} reads no layers of the target; it cannot be trained")
    arch, vocab_size = config.arch, settings.draft_vocab_size or target.vocab_size
    num_layers = arch.num_layers
    if settings.kind == "peagle" and config.kind == "eagle3":
        mask = _mask_token(settings, target)
        config = dataclasses.replace(config, kind="peagle", mask_token_id=mask)
    if config.like_eagle3 and settings.num_layers > num_layers:
        num_layers = settings.num_layers  # see `deepened`
    for name, own, wanted in (
        ("kind", "dense" if dense else config.kind, settings.kind),
        ("num_layers", num_layers, settings.num_layers),
        ("draft_vocab_size", config.draft_vocab_size, vocab_size),
        ("intermediate_size", arch.intermediate_size, settings.intermediate_size),
        ("aux_layers", config.tap_layers(target), settings.aux_layers),
        ("mask_token_id", config.mask_token_id, settings.mask_token_id),
    ):
        if wanted not in (None, own):
            raise ValueError(f"head.init {path} has {name} {own!r}; head.{name} is {wanted!r}")
    if arch.hidden_size != target.hidden_size:
        raise ValueError(
            f"head.init {path} has hidden_size {arch.hidden_size}; only heads of the target's "
            f"{target.hidden_size} can be trained"
        )
    arch = dataclasses.replace(arch, num_layers=num_layers)
    return dataclasses.replace(config, arch=arch, fc_bias=manifest.FC_BIAS in found)


def published_weights(path: Path, config: HeadConfig, target: TargetTensors) -> dict[str, Tensor]:
    """Float32 weights of the head in the directory `path`, which has the configuration `config`.
    ValueError if the head has its own copy of a tensor that training shares with the target."""
    found = open_tensors(path)
    shared = {manifest.EMBEDDING: target.embedding}
    if config.kind == "eagle":
        shared[manifest.LM_HEAD] = target.lm_head
    for name, rows in shared.items():
        if name in found:
            own = found[name].read()
            if not torch.equal(rows.to(own.dtype), own):
                raise ValueError(f"{found[name]} is not the target's; it cannot be trained")
    dropped = (manifest.D2T, manifest.T2D, *shared)
    weights = {
        name: stored.read().float()
        for name, stored in found.items()
        if name not in dropped and not manifest.is_harmless(name)
    }
    if config.like_eagle3:
        weights.setdefault(manifest.LM_HEAD, target.lm_head.float())
    return weights


def published_vocabulary(path: Path, target: LlamaArch) -> Tensor | None:
    """The draft vocabulary [Vd] of the head in the directory `path`; None if it is the target's."""
    found = open_tensors(path)
    if manifest.D2T not in found:
        return None
    return vocab.target_ids_of(found[manifest.D2T].read(), target.vocab_size)


def published_path(settings: HeadSettings) -> Path:
    """The directory of the head that `settings.init` names: one that ships, or a path."""
    found = settings.init
    return shipped_head(found) if found in SHIPPED else Path(found).expanduser()
