"""Build a head from checked tensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from drafter import manifest, vocab
from drafter.heads.config import HeadConfig
from drafter.heads.dflash import BlockAttention, BlockLayer, DFlashHead
from drafter.heads.eagle import EagleHead
from drafter.heads.eagle3 import Eagle3Head, Fusion
from drafter.heads.peagle import PEagleHead
from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.stored import ReadStored
from engine.models.layers import DecoderLayer, GatheredLinear, RMSNorm, VocabParallelEmbedding
from engine.models.loading import LayerLoader
from engine.models.place import Place
from engine.parallel.shard import WHOLE, check_degree
from kernels.linear.quantised import dense
from kernels.ops import LinearWeight, Ops

COMPARED_ROWS = 4096  # rows of a vocabulary per comparison

LoadedHead = EagleHead | Eagle3Head | PEagleHead | DFlashHead


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
        match self.config.kind:
            case "eagle":
                return self._eagle()
            case "eagle3":
                return self._eagle3()
            case "peagle":
                return self._peagle()
            case "dflash":
                return self._dflash()

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

    def _peagle(self) -> PEagleHead:
        assert self.config.mask_token_id is not None
        return PEagleHead(self._eagle3(), self.config.mask_token_id, self._mask_feature())

    def _mask_feature(self) -> Tensor:
        """`fuse` of the learnt hidden states, in plain torch: it is the same for every token, so
        it is computed once, here, where operations must not run."""
        x = self._plain(manifest.MASK_HIDDEN).flatten()
        if not self.config.use_aux:
            return self._as_feature(x)
        eps = self.config.arch.rms_norm_eps
        if self.config.fc_norm:
            parts = x.chunk(self.config.num_taps)
            norms = [self._plain(manifest.fc_norm(index)) for index in range(len(parts))]
            pairs = zip(parts, norms, strict=True)
            x = torch.cat([functional.rms_norm(p, p.shape, norm, eps) for p, norm in pairs])
        if self.config.norm_before_fc:
            x = functional.rms_norm(x, x.shape, self._plain(manifest.INPUT_NORM), eps)
        bias = self._plain(manifest.FC_BIAS) if manifest.FC_BIAS in self.names else None
        return self._as_feature(functional.linear(x, self._plain(manifest.FC), bias))

    def _plain(self, name: str) -> Tensor:
        return dense(self.blocks.read(name)[:]).float()

    def _as_feature(self, x: Tensor) -> Tensor:
        place = self.blocks.place
        return x.to(place.device, place.ops.activation_dtype)

    def _dflash(self) -> DFlashHead:
        assert self.config.mask_token_id is not None
        return DFlashHead(
            arch=self.config.arch,
            shard=self.blocks.place.shard,
            tap_layers=self.config.tap_layers(self.target.arch),
            target_ids=self._target_ids(),
            embedding=self._embedding(),
            fc=self._fc(),
            fused_norm=self.blocks.norm("hidden_norm"),
            layers=tuple(self._block_layer(k) for k in range(self.config.arch.num_layers)),
            norm=self.blocks.norm("norm"),
            lm_head=self._lm_head(),
            mask_token=self.config.mask_token_id,
        )

    def _block_layer(self, index: int) -> BlockLayer:
        name, blocks = f"layers.{index}", self.blocks
        return BlockLayer(
            input_norm=blocks.norm(f"{name}.input_layernorm"),
            attention=self._block_attention(index, f"{name}.self_attn"),
            post_attention_norm=blocks.norm(f"{name}.post_attention_layernorm"),
            mlp=blocks.mlp(f"{name}.mlp"),
        )

    def _block_attention(self, layer: int, name: str) -> BlockAttention:
        queries, keys_values, output = self.blocks.split_attention(name)
        return BlockAttention(
            layer=layer,
            queries=queries,
            keys_values=keys_values,
            query_norm=self.blocks.norm(f"{name}.q_norm"),
            key_norm=self.blocks.norm(f"{name}.k_norm"),
            output=output,
            cos_sin=self.blocks.cos_sin,
            scale=self.config.arch.head_dim**-0.5,
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
