"""Contexts of the parts of a draft head."""

from __future__ import annotations

from drafter.heads.interface import DraftContext
from engine.parallel.shard import Shard
from engine.step.batch import ForwardContext
from engine.step.group import TPGroup


def vocabulary(ctx: DraftContext) -> ForwardContext:
    """The context of embedding and LM head, which are cut over ranks like the target's."""
    return ForwardContext(ctx.ops, ctx.kv, ctx.group)


def inside(ctx: DraftContext, shard: Shard) -> ForwardContext:
    """The context of layers cut as in `shard`: over all ranks, or whole on each."""
    return ForwardContext(ctx.ops, ctx.kv, TPGroup() if shard.size == 1 else ctx.group)
