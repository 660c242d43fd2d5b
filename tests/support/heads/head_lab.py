"""A tiny engine with an untrained draft head, over any operations and on any device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from drafter.checkpoint import load_head, save_eagle3
from drafter.heads.building import HeadBuilder, TargetWeights
from drafter.heads.interface import DraftContext, DraftHead
from drafter.heads.untrained import eagle3_config, random_eagle3
from drafter.proposer import DraftProposer
from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.families import read_text_model
from engine.core import EngineCore
from engine.kv.storage import KVStorage
from engine.models.loading import LayerLoader
from engine.speculation.planner import Planner
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape, chain
from server.assembly.drafting import Drafting
from tests.support.engines.tiny_engine import TinyEngine

BLOCK = 16
# Trees of every kind.
SHAPES: dict[str, TreeShape] = {
    "root": ROOT,
    "chain3": chain(3),
    "tree": StaticShape("tree", (-1, 0, 0, 0, 1, 1, 2, 4, 4, 7)),
    "dynamic": DynamicShape("dynamic", 12, 4, 5),
}


def write_head(engine: TinyEngine, folder: Path) -> Path:
    """A head over every second token, with weights large enough that its logits differ."""
    target = read_text_model(engine.oracle.config.to_dict()).arch
    draft_ids = torch.arange(1, target.vocab_size, 2)
    config = dataclasses.replace(eagle3_config(target, len(draft_ids)), aux_layers=(0, 1))
    save_eagle3(folder, config, target, random_eagle3(config, target, seed=1, std=0.3), draft_ids)
    return folder


@dataclass(frozen=True)
class HeadLab:
    """Builds engines; change a field of `engine` with `dataclasses.replace`."""

    engine: TinyEngine
    head_folder: Path

    def load_head(self) -> DraftHead:
        arch, max_len, place = self._arch, self.engine.max_model_len, self.engine.place
        read = self.engine.oracle.state_dict().__getitem__
        blocks = LayerLoader.of(arch, read, place, max_len)
        shared = [
            blocks.pack_padded(name, arch.vocab_size) for name in ("model.embed_tokens", "lm_head")
        ]
        builder = HeadBuilder(TargetWeights(arch, *shared), place, max_len)
        return load_head(self.head_folder, builder)

    def build(self, planner: Planner) -> tuple[EngineCore, DraftProposer]:
        """Build an engine. The head's pages begin as NaN, so that reading unwritten slots shows."""
        head, engine = self.load_head(), self.engine
        pages = KVStorage.allocate(
            head.arch.num_layers,
            engine.num_blocks + 1,
            BLOCK,
            head.arch.num_kv_heads,
            head.arch.head_dim,
            torch.float32,
            engine.device,
        )
        for page in (*pages.keys, *pages.values):
            page.fill_(torch.nan)
        context = DraftContext(engine.ops, pages)
        proposer = DraftProposer(head, context, engine.max_num_seqs, head.arch.hidden_size)
        return replace(engine, drafting=Drafting(proposer, planner)).build(), proposer

    @property
    def _arch(self) -> LlamaArch:
        return read_text_model(self.engine.oracle.config.to_dict()).arch
