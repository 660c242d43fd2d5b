"""Native libraries for a test session, each compiled once for all of its processes."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.env import default_cache_dir
from kernels.native import build
from kernels.native.build import NativeUnavailableError, Variant, build_library, prebuild


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Other processes of the session wait here, rather than compile the same library."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def share_library(folder: Path) -> None:
    """Put the library of this machine into `folder`: the one that `make install` compiled of the
    same sources, or else one that is compiled now. Without a compiler, `folder` stays empty."""
    installed = default_cache_dir() / "kernels" / f"aerie-{build._key()}.so"
    with _only_process(folder), suppress(NativeUnavailableError):
        target = folder / "kernels" / installed.name
        if installed.is_file() and not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy(installed, target)
        build_library(folder)


def share_variant(variant: Variant, folder: Path) -> Path:
    """The library of these sources for a kind of CPU.

    Raises:
        NativeUnavailableError: there is no compiler, or it failed.
    """
    with _only_process(folder):
        path = build._prebuilt_path(folder, variant)
        return path if path.is_file() else prebuild(variant, folder)
