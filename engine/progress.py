"""What takes a while at a start: how far it has come, for somebody who watches a terminal.

A log has these records at level debug only; what it should always keep is logged besides.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)
ATTRIBUTE = "progress"  # of log records


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` parts; `total` is 0 if it is not known. An empty `text`: all is done."""

    text: str
    done: int = 0
    total: int = 0


def report(text: str, done: int = 0, total: int = 0) -> None:
    """Tell a terminal, if there is one, what is being done."""
    logger.debug("%s %d/%d", text, done, total, extra={ATTRIBUTE: Progress(text, done, total)})


def finish() -> None:
    """Nothing more is to be waited for."""
    logger.debug("done", extra={ATTRIBUTE: Progress("")})
