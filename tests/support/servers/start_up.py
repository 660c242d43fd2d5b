"""Code that the processes of a server run when Python starts in them, so that a test can hold or
harm one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from configs.env import environment

ROOT = Path(__file__).parents[3]


def with_start_up_code(folder: Path, program: str) -> Mapping[str, str]:
    """Environment of a server whose processes run `program` first; `folder` is for its file."""
    (folder / "sitecustomize.py").write_text(program, encoding="utf-8")
    found = environment().get("PYTHONPATH")
    return {"PYTHONPATH": ":".join([str(folder), str(ROOT), *([found] if found else [])])}


def holding_engines(folder: Path, hold: Path) -> Mapping[str, str]:
    """Environment of a server whose engine processes do not begin as long as `hold` exists."""
    return with_start_up_code(
        folder,
        "import pathlib, sys, time\n"
        "while (\n"
        "    'server.process.engine_process' in sys.orig_argv\n"
        f"    and pathlib.Path({str(hold)!r}).exists()\n"
        "):\n"
        "    time.sleep(0.02)\n",
    )
