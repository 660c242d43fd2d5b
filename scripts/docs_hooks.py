"""Hooks of mkdocs: the page of the HTTP API, and links to files of the repository."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(((?:\.\./)[^)\s#]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the page that is made from the OpenAPI document."""
    sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]  # mkdocs has its own path here
    from reference import api

    files.append(File.generated(config, "reference/api.md", content=api()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files outside docs/ become their names, since the site has no such pages."""
    folder = (DOCS / page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(DOCS):
            return link[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: {link[2]} does not exist")
        return f"{link[1]} (`{target.relative_to(ROOT)}`)"

    return LINK.sub(named, markdown)
