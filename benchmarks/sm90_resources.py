"""Compiles every Triton kernel for Hopper, without a GPU, and writes the resources of each.

    python -m benchmarks.sm90_resources           # writes benchmarks/results/sm90-resources.json
    python -m benchmarks.sm90_resources --print   # writes to standard output instead

Exits with 1 if a kernel has a problem (see `kernels.triton_launch.problems`); with --print, always
with 0: the reader checks "problems".
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "benchmarks" / "results" / "sm90-resources.json"

if TYPE_CHECKING:
    from kernels.triton_launch import Launch


def kernel_modules() -> list[str]:
    """Module names of every `kernels/<operation>/triton_kernel.py`."""
    paths = sorted((ROOT / "kernels").glob("*/triton_kernel.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]


def all_launches() -> Iterator[tuple[str, Launch]]:
    """Every configuration that the engine launches, with its module."""
    for module in kernel_modules():
        for launch in importlib.import_module(module).launches():
            yield module, launch


def report() -> dict[str, Any]:
    """Triton's version, the resources of every launch by name, and problems with them."""
    from kernels.triton_launch import compile_for_sm90a, problems  # Triton may be missing

    modules, launches = zip(*all_launches(), strict=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_for_sm90a, launches))
    kernels: dict[str, Any] = {}
    wrong: list[str] = []
    for module, launch, found in zip(modules, launches, compiled, strict=True):
        assert launch.name not in kernels, f"two launches are named {launch.name}"
        kernels[launch.name] = {
            "module": module,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            **dataclasses.asdict(found),
        }
        wrong += problems(launch, found)
    version = importlib.metadata.version("triton")
    return {"triton": version, "problems": wrong, "kernels": kernels}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--print", action="store_true", help="to standard output, not to the file")
    to_output = parser.parse_args().print
    found = report()
    text = json.dumps(found, indent=1)
    if to_output:
        print(text)
        return 0
    REPORT.write_text(text + "\n", encoding="utf-8")
    print("\n".join([f"{len(found['kernels'])} kernels, see {REPORT}", *found["problems"]]))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
