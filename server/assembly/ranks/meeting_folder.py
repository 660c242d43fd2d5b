"""The folder where the ranks of an engine meet. Does not import torch, so that the launcher can use
it to remove the folders of killed engines."""

from __future__ import annotations

import os
import stat

RANKS = "aerie-ranks-"  # prefix of its name
STORE = "store"  # the one file in it


def holds_nothing_else(folder: int) -> bool:
    """Whether an open folder holds at most the store."""
    found = os.listdir(folder)
    kinds = [os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode for name in found]
    return found in ([], [STORE]) and all(stat.S_ISREG(kind) for kind in kinds)
