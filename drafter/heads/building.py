"""Build a head from checked tensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drafter import manifest, vocab
from drafter.heads.config import HeadConfig
from drafter.heads.eagle import EagleHead
from drafter.heads.eagle3 import Eagle3Head, Fusion
from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.stored import ReadStored
from engine.models.layers import DecoderLayer, GatheredLinear, RMSNorm, VocabParallelEmbedding
from engine.models.loading import LayerLoader
from engine.models.place import Place
from engine.parallel.shard import WHOLE, check_degree
from kernels.linear.quantised import dense
from kernels.ops import LinearWeight, Ops

COMPARED_ROWS = 4096  # rows of a vocabulary per comparison

LoadedHead = EagleHead | Eagle3Head


@dataclass(frozen=True, slots=True)
class TargetWeights:
    """Weights that a head may share: this rank's rows of the embedding and LM head, packed."""

    arch: LlamaArch
    embedding: LinearWeight
    lm_head: LinearWeight


@dataclass(frozen=True, slots=True)
class HeadBuilder:
    """Builds heads for one target at its place: layers and `fc` cut as the target is, or
    `replicated`, whole on each rank; the vocabulary always as the target's."""

    target: TargetWeights
    place: Place
    max_len: int  # positions that can be drafted at
    replicated: bool = False

    @property
    def layers_place(self) -> Place:
        """Where layers and `fc` lie, and their pages."""
        return replace(self.place, shard=WHOLE) if self.replicated else self.place

    def build(self, config: HeadConfig, names: Collection[str], read: ReadStored) -> LoadedHead:
        """A head of `config` from the tensors `names`. ValueError, without the file's name, where
        it cannot be cut over so many ranks or the vocabularies do not fit together."""
        place = self.layers_place
        setting = "speculation.draft_parallel = sharded, parallel.tensor"
        check_degree(config.arch, place.shard.size, setting)
        blocks = LayerLoader.of(config.arch, read, place, self.max_len)
        tables = replace(blocks, place=self.place)
        return _Parts(config, self.target, names, blocks, tables).head()


@dataclass(frozen=True, slots=True)
class _Parts:
    """Reads the parts of one head."""

    config: HeadConfig
    target: TargetWeights
    names: Collection[str]
    blocks: LayerLoader  # of layers and `fc`
    tables: LayerLoader  # of what has a row for every token

    def head(self) -> LoadedHead:
        return self._eagle() if self.config.kind == "eagle" else self._eagle3()

    def _eagle(self) -> EagleHead:
        return EagleHead(
            arch=self.config.arch,
            shard=self.blocks.place.shard,
            tap_layers=self.config.tap_layers(self.target.arch),
            embedding=self._embedding(),
            fc=self._fc(),
            first_norm=self._norm_if_there(manifest.FIRST_NORM),
            layers=self._layers(),
            norm=self._norm_if_there(manifest.FINAL_NORM),
            lm_head=self._lm_head(),
        )

    def _eagle3(self) -> Eagle3Head:
        return Eagle3Head(
            arch=self.config.arch,
            shard=self.blocks.place.shard,
            tap_layers=self.config.tap_layers(self.target.arch),
            target_ids=self._target_ids(),
            embedding=self._embedding(),
            embedding_norm=self.blocks.norm("layers.0.input_layernorm"),
            fusion=self._fusion() if self.config.use_aux else None,
            feature_norm=self.blocks.norm("layers.0.hidden_norm"),
            norm_before_residual=self.config.norm_before_residual,
            layers=self._layers(),
            norm=self.blocks.norm("norm"),
            norm_output=self.config.norm_output,
            lm_head=self._lm_head(),
        )

    def _fusion(self) -> Fusion:
        taps = range(self.config.num_taps if self.config.fc_norm else 0)
        before = self.config.norm_before_fc
        return Fusion(
            layer_norms=tuple(self.blocks.norm(f"fc_norm.{index}") for index in taps),
            input_norm=self.blocks.norm("input_norm") if before else None,
            fc=self._fc(),
        )

    def _norm_if_there(self, name: str) -> RMSNorm | None:
        return self.blocks.norm(name.removesuffix(".weight")) if name in self.names else None

    def _fc(self) -> GatheredLinear:
        size = self.config.arch.hidden_size
        weight = self.blocks.pack_padded("fc", size, bias=manifest.FC_BIAS in self.names)
        return GatheredLinear(weight, size)

    def _embedding(self) -> VocabParallelEmbedding:
        size, shared = self.config.arch.vocab_size, self.target.embedding
        return VocabParallelEmbedding(self._own_or_shared("embed_tokens", size, shared))

    def _lm_head(self) -> GatheredLinear:
        size, shared = self.config.draft_vocab_size, self.target.lm_head
        return GatheredLinear(self._own_or_shared("lm_head", size, shared), size)

    def _layers(self) -> tuple[DecoderLayer, ...]:
        """Heads prepare the first layer's input themselves."""
        return tuple(
            self.blocks.decoder_layer(index, f"layers.{index}", with_input_norm=index > 0)
            for index in range(self.config.arch.num_layers)
        )

    def _own_or_shared(self, name: str, size: int, shared: LinearWeight) -> LinearWeight:
        """This rank's rows of the file's weight; `shared` if the file has none or an equal one."""
        if f"{name}.weight" not in self.names:
            return shared
        place = self.tables.place
        own = self.tables.padded(f"{name}.weight", size)
        if same_rows(own, shared, place.ops):
            return shared
        return place.packer.pack([own], len(own), None)

    def _target_ids(self) -> Tensor | None:
        size = self.config.arch.vocab_size
        if manifest.D2T in self.names:
            ids = vocab.target_ids_of(dense(self.tables.read(manifest.D2T)[:]), size)
        else:
            ids = torch.arange(size)
        if manifest.T2D in self.names:
            vocab.check_mask(dense(self.tables.read(manifest.T2D)[:]), ids)
        return None if vocab.is_identity(ids, size) else ids.to(self.tables.place.device)


def same_rows(own: Tensor, packed: LinearWeight, ops: Ops) -> bool:
    """Whether the rows of `packed` equal `own` [V, H]."""
    if own.shape != (packed.out_features, packed.in_features):
        return False
    for first in range(0, len(own), COMPARED_ROWS):
        rows = own[first : first + COMPARED_ROWS].to(ops.activation_dtype)
        ids = torch.arange(first, first + len(rows), device=own.device)
        if not torch.equal(ops.embedding(ids, packed), rows):
            return False
    return True
