"""What a drafter needs from a draft head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from engine.checkpoints.arch import LlamaArch
from engine.kv.storage import KVStorage
from engine.parallel.shard import Shard
from engine.step.group import TPGroup
from kernels.ops import AttentionMeta, Ops


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """Packed entries of one draft forward. Entry c is computed from the token at `positions[c]` and
    the feature of the token before it; its KV lies in the slot of `positions[c]`."""

    token_ids: Tensor  # [C] int64, ids of the target's vocabulary
    positions: Tensor  # [C] int64
    slots: Tensor  # [C] int64
    attention: AttentionMeta
    feature_of: Tensor | None = None  # [C] int64, the row of each one's feature; None: its own

    def own(self, features: Tensor) -> Tensor:
        """The feature of each entry, [C, H]."""
        return features if self.feature_of is None else features[self.feature_of]


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a draft forward needs besides its batch."""

    ops: Ops
    kv: KVStorage  # the head's own pages, one pair of tensors per layer of the head
    group: TPGroup = field(default_factory=TPGroup)  # the target's


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """How a head lays out the entries of one forward that drafts all tokens after the roots. Entry
    j of a row lies in the slot j + 1 places after the root's."""

    token_ids: Tensor  # [B, n] int64
    first_position: int  # of entry 0, counted from the root's position
    causal: bool  # whether an entry sees only those before it, and not those after it


class DraftHead(Protocol):
    """A loaded draft head, stateless. If several ranks share the target, each calls the same
    methods with the same input and gets the same, whole output."""

    @property
    def arch(self) -> LlamaArch:
        """Shape of its layers."""
        ...

    @property
    def shard(self) -> Shard:
        """This rank's part of the layers; its pages hold `shard.num_kv_heads` KV heads."""
        ...

    @property
    def tap_layers(self) -> tuple[int, ...]:
        """Places in the target that `fuse` reads, in order (see `engine.step.taps`)."""
        ...

    @property
    def target_ids(self) -> Tensor | None:
        """[Vd] int64, the target's token id of each draft id; None if they are equal."""
        ...

    def fuse(self, features: tuple[Tensor, ...], ctx: DraftContext) -> Tensor:
        """Target features, one [C, H target] per tap layer -> [C, H] as `forward` takes them."""
        ...

    def forward(self, features: Tensor, batch: DraftBatch, ctx: DraftContext) -> Tensor:
        """Features as `batch.own` takes them -> [C, H] states. `logits` takes a state, and it is
        the feature of the next drafted token. Writes the entries' keys and values to their
        slots."""
        ...

    def logits(self, states: Tensor, ctx: DraftContext) -> Tensor:
        """[C, H] -> [C, Vd] over the draft vocabulary, for the token after each entry; as precise
        as its last product gives them."""
        ...


@runtime_checkable
class ParallelHead(DraftHead, Protocol):
    """A head that guesses all tokens after a root in one forward, each without knowing the others.
    `forward` only takes committed tokens."""

    @property
    def mask_token(self) -> int:
        """The token that stands for those to be guessed."""
        ...

    def block(self, root_tokens: Tensor, depth: int) -> DraftBlock | None:
        """The entries that draft `depth` tokens after the roots [B]; None where none is needed."""
        ...

    def draft(
        self, root_states: Tensor, batch: DraftBatch | None, depth: int, ctx: DraftContext
    ) -> Tensor:
        """[B, depth, H] states, for the tokens 1, 2, ... after the roots, from the roots' states
        [B, H] and the packed entries of `block`."""
        ...
