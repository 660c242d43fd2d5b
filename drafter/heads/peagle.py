"""P-EAGLE heads (arXiv:2602.01469): EAGLE-3 heads that draft all tokens at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.heads.eagle3 import Eagle3Head
from drafter.heads.interface import DraftBatch, DraftBlock, DraftContext
from engine.checkpoints.arch import LlamaArch
from engine.parallel.shard import Shard


@dataclass(frozen=True, slots=True)
class PEagleHead:
    """Implements `ParallelHead`. The root has its ordinary entry. For every further token there is
    an entry of the mask token and of one learnt feature, which sees those before it."""

    eagle3: Eagle3Head
    mask_token: int
    mask_feature: Tensor  # [H] as `fuse` would make it

    @property
    def arch(self) -> LlamaArch:
        return self.eagle3.arch

    @property
    def shard(self) -> Shard:
        return self.eagle3.shard

    @property
    def tap_layers(self) -> tuple[int, ...]:
        return self.eagle3.tap_layers

    @property
    def target_ids(self) -> Tensor | None:
        return self.eagle3.target_ids

    def fuse(self, features: tuple[Tensor, ...], ctx: DraftContext) -> Tensor:
        return self.eagle3.fuse(features, ctx)

    def forward(self, features: Tensor, batch: DraftBatch, ctx: DraftContext) -> Tensor:
        return self.eagle3.forward(features, batch, ctx)

    def logits(self, states: Tensor, ctx: DraftContext) -> Tensor:
        return self.eagle3.logits(states, ctx)

    def block(self, root_tokens: Tensor, depth: int) -> DraftBlock | None:
        if depth == 1:
            return None
        masks = torch.full_like(root_tokens, self.mask_token)[:, None].expand(-1, depth - 1)
        return DraftBlock(masks, first_position=1, causal=True)

    def draft(
        self, root_states: Tensor, batch: DraftBatch | None, depth: int, ctx: DraftContext
    ) -> Tensor:
        root = root_states[:, None]
        if batch is None:
            return root
        features = self.mask_feature.expand(len(batch.token_ids), -1).contiguous()
        guessed = self.eagle3.forward(features, batch, ctx)
        return torch.cat((root, guessed.view(len(root), depth - 1, -1)), dim=1)
