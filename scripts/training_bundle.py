"""Packs everything that training on a machine without network needs, in parts of bounded size.

    python scripts/training_bundle.py --prompts prompts.jsonl --output build/training
    # there, with torch and triton installed, and all parts in one folder:
    cat part-* | tar x && sh run.sh 9

Packages that the machine lacks go along with `--site DIR`, a folder that `pip install --target DIR
pydantic msgspec pyzmq gguf typer rich PyYAML safetensors numpy` fills for its version of Python.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ("aerie.py", "configs", "kernels", "engine", "drafter", "server")
LEFT_OUT = ("__pycache__", "prebuilt", "node_modules")
PART_BYTES, MOST_PARTS = 60 << 20, 2
RUN = """\
#!/bin/sh
# sh run.sh MINUTES [SECTION.KEY=VALUE]...: trains within so many minutes. Results are in $OUT/head
# and $OUT/run, from the first checkpoint on, also if the run is cut off. SIGTERM ends it early.
set -eu
minutes=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-$here/out}
python=${PYTHON:-python3}
cd "$here"
test -d source || "$python" -m tarfile -e small.tar.xz .
export PYTHONPATH="$here/source:$here/site" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
publish() {
  "$python" -m server.cli publish-draft "$out/run" --output "$out/head" --replace \\
    --max-file-bytes 16000000
}
(while sleep 40; do publish || true; done) >/dev/null 2>&1 &
publisher=$!
"$python" -m server.cli train-draft --config smollm2-eagle3-gpu "data.prompts=[prompts.jsonl]" \\
  "model.source=$here/MODEL" "run.output=$out/run" "run.minutes=$minutes" "$@" &
trainer=$!
trap 'kill $publisher 2>/dev/null || true' EXIT
trap 'kill $trainer' INT TERM
code=0
wait $trainer || code=$?
while kill -0 $trainer 2>/dev/null; do  # a signal ends `wait` early
  code=0
  wait $trainer || code=$?
done
test $code = 0 || exit $code
kill $publisher 2>/dev/null || true
publish
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines of prompts")
    parser.add_argument("--model", type=Path, help="a .gguf file or a folder; default: the bundled")
    parser.add_argument("--site", type=Path, help="a folder of packages to take along")
    parser.add_argument("--output", type=Path, default=Path("build/training"))
    parser.add_argument("--part-bytes", type=int, default=PART_BYTES)
    parser.add_argument("--most-parts", type=int, default=MOST_PARTS)
    asked = parser.parse_args()
    try:
        model = asked.model or _bundled()
        parts = write_bundle(asked.output, model, asked.prompts, asked.site, asked.part_bytes)
    except OSError as error:
        raise SystemExit(f"training_bundle: {error}") from None
    for part in parts:
        print(f"{part} {part.stat().st_size / 2**20:.1f} MiB")
    if len(parts) > asked.most_parts:
        raise SystemExit(f"training_bundle: {len(parts)} parts; --most-parts is {asked.most_parts}")


def write_bundle(
    output: Path, model: Path, prompts: Path, site: Path | None, part_bytes: int
) -> list[Path]:
    """Write the parts, whose bytes one after the other are a tar file. OSError if a file is missing
    or the disk is full."""
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("part-*"):
        old.unlink()
    small, whole = output / "small.tar.xz", output / "whole.tar"
    with tarfile.open(small, "w:xz", preset=1) as tar:
        for name in SOURCE:
            tar.add(ROOT / name, f"source/{name}", filter=_kept)
        tar.add(prompts, "prompts.jsonl")
        if site is not None:
            tar.add(site, "site", filter=_kept_of_site)
    with tarfile.open(whole, "w") as tar:
        kind = "model" if model.is_dir() else "model.gguf"
        script = RUN.replace("MODEL", kind).encode()
        entry = tarfile.TarInfo("run.sh")
        entry.size, entry.mode = len(script), 0o755
        tar.addfile(entry, io.BytesIO(script))
        tar.add(small, small.name)
        tar.add(model, kind)
    small.unlink()
    parts = list(_cut(whole, part_bytes))
    whole.unlink()
    return parts


def _kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = Path(entry.name).name
    return None if name in LEFT_OUT or name.endswith(".so") else entry


def _kept_of_site(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if Path(entry.name).name == "__pycache__" else entry


def _cut(whole: Path, part_bytes: int) -> Iterator[Path]:
    """Files of at most so many bytes."""
    with whole.open("rb") as file:
        number = 0
        while True:
            path = whole.with_name(f"part-{number:02}")
            with path.open("wb") as part:
                shutil.copyfileobj(_Limited(file, part_bytes), part)
            if not path.stat().st_size:
                path.unlink()
                return
            yield path
            number += 1


class _Limited:
    """The next bytes of a file, up to a limit."""

    def __init__(self, file: io.BufferedReader, left: int) -> None:
        self._file, self._left = file, left

    def read(self, size: int) -> bytes:
        found = self._file.read(min(size, self._left))
        self._left -= len(found)
        return found


def _bundled() -> Path:
    sys.path.insert(0, str(ROOT))
    from engine.checkpoints.source import bundled_gguf

    return bundled_gguf()


if __name__ == "__main__":
    main()
