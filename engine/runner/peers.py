"""What a runner's pages hold, on its way to another engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kv.storage import KVStorage
from engine.kv.transfer import KVTransfer
from engine.messages import DraftState
from engine.scheduler.handovers import Pages
from engine.speculation.proposer import Proposer


def pages_of(kv: KVStorage, proposer: Proposer) -> list[Tensor]:
    """All that belongs to a block: keys and values of the target, and what the proposer keeps."""
    return [*kv.keys, *kv.values, *proposer.pages]


class TransferPeers:
    """Implements `Peers` over a transfer of `pages_of` a runner's cache and its proposer."""

    def __init__(self, transfer: KVTransfer, proposer: Proposer) -> None:
        self._transfer = transfer
        self._proposer = proposer

    @property
    def endpoint(self) -> bytes:
        return self._transfer.endpoint

    @torch.inference_mode()
    def send(self, pages: Pages) -> None:
        self._transfer.send(pages.peer, pages.blocks, pages.places, pages.endpoint)

    @torch.inference_mode()
    def receive(self, peer: int, blocks: Sequence[int]) -> None:
        self._transfer.receive(peer, blocks)

    @torch.inference_mode()
    def draft_state(self, line: int) -> DraftState | None:
        return self._proposer.hand_over(line)
