"""Compile the C++ kernels into one shared library, once per machine and source version.

The library lies in a cache folder under a name made of everything that went into it, so that a
changed source, compiler or CPU leads to a new one. `python -m kernels.native.build --help` compiles
ahead of time, as a container image does.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
SOURCES = (
    "native/pool.cpp",
    "linear/native_kernel.cpp",
    "norm/native_kernel.cpp",
    "rope/native_kernel.cpp",
    "attention/native_kernel.cpp",
    "activation/native_kernel.cpp",
    "sampling/native_kernel.cpp",
)
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT = 300  # seconds for one compilation
LOCAL_MARCH = "native"

logger = logging.getLogger(__name__)


class NativeUnavailableError(RuntimeError):
    """The native kernels cannot be built here; the message says why."""


def build_library(cache_dir: Path, march: str = LOCAL_MARCH) -> Path:
    """The compiled library for this machine, compiling it if the cache has none.

    A library that was compiled ahead for another `march` is taken when `march` is "native" and no
    compiler is at hand.

    Raises:
        NativeUnavailableError: no compiler, or it failed.
    """
    folder = cache_dir / "kernels"
    compiler = find_compiler()
    if compiler is None:
        return _compiled_ahead(folder)
    target = folder / f"aerie-{_key(compiler, march)}.so"
    if not target.is_file():
        _compile(compiler, march, target)
    return target


@functools.cache
def find_compiler() -> tuple[str, ...] | None:
    """The command of a C++20 compiler: one on the PATH, else the `ziglang` wheel."""
    for name in COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "c++")
    return None


def _compiled_ahead(folder: Path) -> Path:
    """A library that another machine compiled for this version of the sources."""
    for path in sorted(folder.glob(f"ahead-{_sources_key()}-*.so")):
        return path
    raise NativeUnavailableError(
        f"no C++ compiler ({', '.join(COMPILERS)}) is installed, nor the ziglang wheel "
        f"(pip install ziglang)"
    )


def build_ahead(cache_dir: Path, march: str) -> Path:
    """Compile for `march`, to be used where no compiler is installed."""
    compiler = find_compiler()
    if compiler is None:
        raise NativeUnavailableError(f"no C++ compiler ({', '.join(COMPILERS)}) is installed")
    target = cache_dir / "kernels" / f"ahead-{_sources_key()}-{march}.so"
    _compile(compiler, march, target)
    return target


def _compile(compiler: Sequence[str], march: str, target: Path) -> None:
    """Write beside the final place, then rename: readers see a whole library or none."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="compiling-") as scratch:
            fresh = Path(scratch) / target.name
            command = [*compiler, *FLAGS, f"-march={march}"]
            command += [*(str(PACKAGE / source) for source in SOURCES), "-o", str(fresh)]
            logger.info("compiling the native kernels; this is done once")
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
            if done.returncode != 0:
                raise NativeUnavailableError(_failure(command, done.stderr))
            fresh.rename(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"compiling into {target.parent}: {error}") from error


def _failure(command: Sequence[str], stderr: str) -> str:
    lines = stderr.strip().splitlines()
    first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
    return f"{command[0]} failed: {first}"


def _key(compiler: Sequence[str], march: str) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(f"{_sources_key()} {march} {_cpu()}".encode())
    digest.update(" ".join(compiler).encode() + version)
    return digest.hexdigest()[:24]


@functools.cache
def _sources_key() -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode() + platform.machine().encode())
    for path in sorted([*PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")]):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:24]


@functools.cache
def _cpu() -> str:
    """What decides which instructions `-march=native` may use."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in text.splitlines() if line.startswith(names)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.native.build", description="Compile the native CPU kernels."
    )
    parser.add_argument("--cache-dir", type=Path, required=True, help="as files.dir of the server")
    parser.add_argument(
        "--march", default=LOCAL_MARCH, help="GCC's name of the CPU, e.g. x86-64-v3 (default here)"
    )
    chosen = parser.parse_args(arguments)
    build = build_library if chosen.march == LOCAL_MARCH else build_ahead
    try:
        sys.stdout.write(f"{build(chosen.cache_dir, chosen.march)}{os.linesep}")
    except NativeUnavailableError as error:
        raise SystemExit(f"native kernels: {error}") from error


if __name__ == "__main__":
    main()
