"""How many bytes a model takes, and the progress of loading one."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

GIB = 1024**3
EVERY = 5.0  # seconds between log lines about loading

logger = logging.getLogger(__name__)


def held_bytes(*parts: Any) -> int:
    """Bytes of all tensors in (nested) dataclasses and tuples. A shared tensor counts once."""
    return sum(tensor.nbytes for tensor in {id(each): each for each in _tensors(parts)}.values())


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for each in part:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from _tensors(getattr(part, field.name))


def layers_with_progress(
    num_layers: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[int]:
    """The indices of the layers to load. Logs every few seconds how many are done."""
    said = clock()
    for index in range(num_layers):
        if clock() - said >= EVERY:
            said = clock()
            logger.info("loading the model: %d of %d layers", index, num_layers)
        yield index
