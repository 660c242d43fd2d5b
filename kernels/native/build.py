"""Compile the C++ kernels into one shared library, once per machine and source version.

The library's file name in the cache folder is a hash of the sources, flags and CPU, so a change of
any of them compiles a new library. `python -m kernels.native.build --prebuild` compiles ahead for
several kinds of CPU, for images that have no compiler at run time.
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
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
SOURCES = (
    "native/pool.cpp",
    "linear/native_kernel.cpp",
    "linear/group_native.cpp",
    "norm/native_kernel.cpp",
    "rope/native_kernel.cpp",
    "attention/native_kernel.cpp",
    "kv/native_kernel.cpp",
    "activation/native_kernel.cpp",
    "moe/native_kernel.cpp",
    "sampling/native_kernel.cpp",
    "layer/native_kernel.cpp",
    "tree/native_kernel.cpp",
    "drafting/native_kernel.cpp",
    "packing/native_kernel.cpp",
)
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fPIC", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
NO_COMPILER = (
    f"no C++ compiler ({', '.join(COMPILERS)}) is installed, nor the ziglang wheel "
    "(pip install ziglang)"
)
TIMEOUT = 300  # seconds for one compilation
ROOM = 8 * 2**20  # bytes, more than a library has
LOCAL = ("-march=native",)
PREBUILT = PACKAGE / "native" / "prebuilt"

logger = logging.getLogger(__name__)


class NativeUnavailableError(RuntimeError):
    """The native kernels cannot be built here; the message says why."""


class NativeCompileError(NativeUnavailableError):
    """There is a compiler, and it refuses the kernels."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A kind of CPU: compiler flags, and the features that /proc/cpuinfo must list to run it."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


AVX2 = frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
AVX512_FLAGS = ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16")
X86_VARIANTS = (  # the best first
    Variant(
        "amx",
        (*AVX512_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
    ),
    Variant(
        "avx512bf16",
        AVX512_FLAGS,
        AVX512 | {"avx512_vnni", "avx512_bf16"},
    ),
    Variant("avx512vnni", ("-march=x86-64-v4", "-mavx512vnni"), AVX512 | {"avx512_vnni"}),
    Variant("avx512", ("-march=x86-64-v4",), AVX512),
    Variant("avxvnni", ("-march=x86-64-v3", "-mavxvnni"), AVX2 | {"avx_vnni"}),
    Variant("avx2", ("-march=x86-64-v3",), AVX2),
    Variant("sse2", ("-march=x86-64",), frozenset()),
)
OTHER_VARIANTS = (Variant("generic", (), frozenset()),)


def variants() -> tuple[Variant, ...]:
    """The variants that can be built ahead for this machine's architecture."""
    return X86_VARIANTS if platform.machine() in ("x86_64", "AMD64") else OTHER_VARIANTS


def build_library(cache_dir: Path, prebuilt: Path = PREBUILT) -> Path:
    """The library for this machine: from the cache, or compiled now; without a compiler, the best
    one that was compiled ahead. Where the cache cannot be written to, a private folder among the
    temporary files takes its place.

    Raises:
        NativeUnavailableError: no compiler and nothing compiled ahead, or the compiler failed.
    """
    target = cache_dir / "kernels" / f"aerie-{_key()}.so"
    if os.path.isfile(target):  # False, too, where it may not be looked up
        return target
    compiler = find_compiler()
    if compiler is None:
        return find_prebuilt(prebuilt)
    problem = _why_unusable(target.parent)
    if problem is not None:
        folder = private_folder()
        _warn_once(problem, folder)
        target = folder / target.name
    if not target.is_file():
        _compile(compiler, LOCAL, target)
    return target


@functools.cache
def _warn_once(problem: str, folder: Path) -> None:
    logger.warning(
        "files.dir cannot be used (%s): the compiled kernels are kept in %s instead, which may be "
        "emptied at any time",
        *(problem, folder),
    )


def private_folder() -> Path:
    """A folder that only this user can write to, the same one at every start.

    Raises:
        NativeUnavailableError: there is none to be had.
    """
    folder = Path(tempfile.gettempdir()) / f"aerie-kernels-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise NativeUnavailableError(f"no folder for compiled kernels: {error}") from error
    # Whoever else could write there could have us run their code.
    others = stat.S_IWGRP | stat.S_IWOTH
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & others:
        raise NativeUnavailableError(f"{folder} is not this user's own folder")
    if problem := _why_unusable(folder):
        raise NativeUnavailableError(f"no folder for compiled kernels: {problem}")
    return folder


def _why_unusable(folder: Path) -> str | None:
    """Why a library cannot be written to `folder`; None if it can. Makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, ROOM)
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    return None


def find_prebuilt(folder: Path) -> Path:
    """The best library of these sources under `folder` that this CPU can run."""
    flags = cpu_flags()
    for variant in variants():
        path = _prebuilt_path(folder, variant)
        if variant.needs <= flags and path.is_file():
            return path
    if any(folder.glob("*.so")):
        raise NativeUnavailableError(
            f"{NO_COMPILER}; what {folder} holds is for other sources or CPUs"
        )
    raise NativeUnavailableError(NO_COMPILER)


def prebuild(variant: Variant, folder: Path = PREBUILT) -> Path:
    """Compile for a kind of CPU, to be found by `find_prebuilt`."""
    compiler = find_compiler()
    if compiler is None:
        raise NativeUnavailableError(NO_COMPILER)
    target = _prebuilt_path(folder, variant)
    _compile(compiler, variant.flags, target)
    return target


def _prebuilt_path(folder: Path, variant: Variant) -> Path:
    return folder / f"aerie-{_sources_key()}-{variant.name}.so"


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


def _compile(compiler: Sequence[str], flags: Sequence[str], target: Path) -> None:
    """Write to a temporary folder, then rename: readers see a whole library or none. Sources are
    compiled at the same time, on all cores."""
    command = [*compiler, *FLAGS, *flags]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="compiling-") as scratch:
            logger.info("compiling the native kernels; this is done once")
            objects = [Path(scratch) / f"{number}.o" for number in range(len(SOURCES))]
            commands = [
                [*command, "-c", str(PACKAGE / source), "-o", str(to)]
                for source, to in zip(SOURCES, objects, strict=True)
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_run, commands))
            fresh = Path(scratch) / target.name
            _run([*command, "-shared", *map(str, objects), "-o", str(fresh)])
            fresh.rename(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"compiling into {target.parent}: {error}") from error


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode != 0:
        raise NativeCompileError(_failure(command, done.stderr))


def _failure(command: Sequence[str], stderr: str) -> str:
    lines = stderr.strip().splitlines()
    first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
    return f"{command[0]} failed: {first}"


def _key() -> str:
    """Hash of the sources and this CPU. Not of the compiler: a compiled library must be found
    again when no compiler is on the PATH."""
    return hashlib.sha256(f"{_sources_key()} {LOCAL} {cpu_name()}".encode()).hexdigest()[:24]


@functools.cache
def _sources_key() -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode() + platform.machine().encode())
    for path in sorted([*PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")]):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:24]


@functools.cache
def cpu_name() -> str:
    """This kind of CPU, with text that determines which instructions `-march=native` may use."""
    names = ("model name", "flags", "Features", "CPU part")
    lines = dict.fromkeys(line for line in _cpuinfo() if line.startswith(names))
    return "\n".join(lines) or f"{platform.machine()} {platform.processor()}"


def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU, as Linux names them; empty if Linux does not list them."""
    return next(
        (frozenset(line.split()) for line in _cpuinfo() if line.startswith("flags")), frozenset()
    )


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.native.build", description="Compile the native CPU kernels."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--cache-dir", type=Path, help="for this machine, into files.dir")
    where.add_argument("--prebuild", action="store_true", help="for all CPUs, into the package")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.prebuild:
            paths = [prebuild(variant) for variant in variants()]
        else:
            paths = [build_library(chosen.cache_dir)]
    except NativeUnavailableError as error:
        raise SystemExit(f"native kernels: {error}") from error
    sys.stdout.writelines(f"{path}\n" for path in paths)


if __name__ == "__main__":
    main()
