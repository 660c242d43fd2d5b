"""Step costs that are kept between starts, in the cache folder.

A file is small, and belongs to one configuration: architecture, kernels, threads, forms of the
weights, head. It is only a first guess: a few steps at start check it, and every step that serves
corrects it. A file that cannot be read or written is left alone with a line in the log.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.files import read_text
from engine.speculation.costs import StepCosts

MAX_FILE = 65_536  # bytes
WRITER = "step-costs"  # name of the thread
VERSION = 5  # of what the numbers mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeptCosts:
    """The files of one engine."""

    folder: Path
    identity: str  # of all that the costs depend on, except the head

    def load(self, head: Hashable) -> StepCosts | None:
        """What was kept for a head; None if there is nothing of use."""
        path = self._path(head)
        try:
            return _parsed(read_text(path, MAX_FILE))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            logger.warning("step costs in %s cannot be used: %s", path, error)
            return None

    def save(self, head: Hashable, costs: StepCosts) -> None:
        """Keep costs for the next start. A thread writes: a slow disk holds up no step."""
        text = json.dumps(asdict(costs))
        where = self._path(head)
        threading.Thread(target=_write, args=(where, text), name=WRITER, daemon=True).start()

    def _path(self, head: Hashable) -> Path:
        key = hashlib.sha256(f"{VERSION} {self.identity} {head!r}".encode()).hexdigest()[:32]
        return self.folder / "step-costs" / f"{key}.json"


def _parsed(text: str) -> StepCosts:
    """ValueError or TypeError unless `text` holds costs."""
    costs, known = StepCosts(**json.loads(text)), StepCosts.guessed()
    for name in ("values", "doubts", "drifts", "limits"):
        numbers = getattr(costs, name)
        if len(numbers) != len(getattr(known, name)) or not all(map(_is_cost, numbers)):
            raise ValueError(f"{name} is not a list of {len(known.values)} finite numbers")
    if not (_is_cost(costs.scale) and costs.scale > 0 and isinstance(costs.num_observed, int)):
        raise ValueError(f"scale is {costs.scale!r}, not a positive number")
    return costs


def _is_cost(number: object) -> bool:
    return isinstance(number, float | int) and abs(number) < 1e9  # false for a NaN, too


def _write(path: Path, text: str) -> None:
    """Readers see the whole file or the one before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix="writing-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except OSError as error:
        logger.warning("step costs cannot be kept in %s: %s", path.parent, error)
