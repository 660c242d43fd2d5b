"""How many bytes a model takes, and the progress of loading one."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.arch import LlamaArch
from engine.progress import report
from engine.step.batch import LOGIT_ROWS
from kernels.ops import LinearWeight

GIB = 1024**3
ROUNDED_UP = 1.25  # a padded step has at most a quarter more tokens than the budget
EVERY = 5.0  # seconds between log lines about loading

logger = logging.getLogger(__name__)


def held_bytes(*parts: Any) -> int:
    """Bytes of all tensors in (nested) dataclasses and tuples. A shared tensor counts once."""
    return sum(bytes_by_form(*parts).values())


def bytes_by_form(*parts: Any) -> dict[str, int]:
    """The same by form: the type of plain numbers, and what `Ops.reads` calls quantised weights,
    with their scales."""
    seen: set[int] = set()
    found: dict[str, int] = {}
    for form, tensor in _forms(parts, None):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[form] = found.get(form, 0) + tensor.nbytes
    return dict(sorted(found.items()))


def _forms(part: Any, form: str | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with the form of the weight that it belongs to."""
    if isinstance(part, LinearWeight):
        form = None if part.layout is None else part.layout.form
    if isinstance(part, Tensor):
        yield form or str(part.dtype).removeprefix("torch."), part
        return
    for each in _fields(part):
        yield from _forms(each, form)


def step_bytes(
    arch: LlamaArch, size: int, activation: torch.dtype, max_num_seqs: int, max_num_tokens: int
) -> int:
    """About what one of `size` ranks takes beside weights and cache for the largest step: the
    activations of a layer, features for a draft head, logits and what is made of them, and counts
    of tokens by sequence."""
    attention = 2 * (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim // size
    widest = max(attention, 3 * max(arch.feed_forward_sizes) // size)
    features = 3 * arch.hidden_size
    per_token = (3 * arch.hidden_size + features + widest) * activation.itemsize
    logits = 3 * LOGIT_ROWS * arch.vocab_size * 4  # raw, edited, and to rank drafts by
    counts = (max_num_seqs + 1) * arch.vocab_size * 4
    return int(ROUNDED_UP * max_num_tokens * per_token) + logits + counts


def _fields(part: Any) -> Iterator[Any]:
    """What a tuple or a dataclass holds."""
    if isinstance(part, tuple):
        yield from part
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield getattr(part, field.name)


def layers_with_progress(
    num_layers: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[int]:
    """The indices of the layers to load. Logs every few seconds how many are done, and reports each
    one as progress."""
    said = clock()
    for index in range(num_layers):
        report("loading the model", index, num_layers)
        if clock() - said >= EVERY:
            said = clock()
            logger.info("loading the model: %d of %d layers", index, num_layers)
        yield index
