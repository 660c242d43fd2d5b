"""The folder where the ranks of an engine meet. Known without torch, so that a launcher can remove
what a killed engine left."""

from __future__ import annotations

import os
import stat

RANKS = "aerie-ranks-"  # begins its name
STORE = "store"  # the one file in it


def holds_nothing_else(folder: int) -> bool:
    """Whether there is at most the store in an open folder."""
    found = os.listdir(folder)
    kinds = [os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode for name in found]
    return found in ([], [STORE]) and all(stat.S_ISREG(kind) for kind in kinds)
