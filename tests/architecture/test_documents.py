"""Paths in the documents exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source_tree import ALL, ROOT

DOCUMENTS = (
    "README.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md")),
)
TOP = (*ALL, "docs")
MADE_LATER = "reference/api.md"  # when the site is built
ENDINGS = ("py", "md", "yaml", "yml", "toml", "cpp", "h", "sh", "json", "jinja")
# A path is below a top-level folder, or ends like a file; it is not part of a URL, an absolute
# path or a model's name. Diagrams of a package leave out the package.
WORD = re.compile(r"(?<![\w/.:~$-])[\w.-]+(?:/[\w.*-]+)*/?(?![\w/])")


def named_paths(text: str) -> Iterator[str]:
    for found in WORD.finditer(text):
        path = found.group().rstrip("./")
        parts = path.split("/")
        if len(parts) > 1 and (parts[0] in TOP or path.rpartition(".")[2] in ENDINGS):
            yield path


def missing_paths(text: str, root: Path, beside: Path | None = None) -> list[str]:
    """Paths in `text` that lie neither below `root`, nor below one of its top-level folders, nor
    `beside` the document."""
    folders = [root, *(root / name for name in TOP), *([beside] if beside else [])]
    text = text.replace(MADE_LATER, "")
    return [path for path in named_paths(text) if not any(any(f.glob(path)) for f in folders)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_of_a_document_exists(document: str) -> None:
    path = ROOT / document
    if not path.is_file():
        pytest.skip(f"{document} is not written yet")
    assert missing_paths(path.read_text(encoding="utf-8"), ROOT, path.parent) == []


def test_documents_are_found_and_name_paths() -> None:
    assert "docs/architecture.md" in DOCUMENTS
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert {"server/openai/request", "scheduler/scheduler.py", "engine/core.py"} <= set(
        named_paths(text)
    )


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("see `engine/core.py`.", ["engine/core.py"]),
        ("see engine/core.py, and tests/architecture/", ["engine/core.py", "tests/architecture"]),
        ("[here](docs/architecture.md)", ["docs/architecture.md"]),
        ("  models/llama.py   forward", ["models/llama.py"]),
        ("server/openai/*  and configs/serve/*.yaml", ["server/openai/*", "configs/serve/*.yaml"]),
        ("ends here: server/http/app.py.", ["server/http/app.py"]),
        ("https://example.com/docs/page.md and /v1/models and org/name", []),
        ("~/.cache/aerie/x.json, $HOME/tests/a.py, /etc/engine/x.yaml", []),
        ("and/or, 8xH100, `/ready`, 1/2", []),
    ],
)
def test_paths_differ_from_other_words(text: str, paths: list[str]) -> None:
    assert list(named_paths(text)) == paths


def test_a_missing_path_is_seen(tmp_path: Path) -> None:
    (tmp_path / "engine" / "models").mkdir(parents=True)
    (tmp_path / "engine" / "models" / "llama.py").touch()
    text = "engine/models/llama.py, models/llama.py, engine/models/*.py, engine/gone.py, a/b.py"
    assert missing_paths(text, tmp_path) == ["engine/gone.py", "a/b.py"]
    assert missing_paths("engine/models/*.yaml", tmp_path) == ["engine/models/*.yaml"]
