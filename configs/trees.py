"""Draft trees that the configuration can name: files under configs/tree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import Field

from configs.files import read_text
from configs.load import ConfigError
from configs.schema import Integer, Section
from configs.values import parse, typed


class StaticTree(Section):
    """The same tree for every token."""

    parents: tuple[Integer, ...] = Field(
        description="parent of every node; -1 for the root, which is node 0"
    )


class DynamicTree(Section):
    """The likeliest nodes, chosen anew for every token."""

    num_nodes: Integer = Field(description="nodes to keep, the root included")
    max_depth: Integer
    top_k: Integer = Field(description="children per node, and width of a level")


TreeConfig = StaticTree | DynamicTree


def shipped_trees() -> dict[str, Path]:
    """Names and paths of the files under configs/tree."""
    folder = Path(__file__).parent / "tree"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def load_tree(name: str) -> TreeConfig:
    """The tree of a shipped file, or of a path. ConfigError if it is missing or invalid."""
    path = shipped_trees().get(name, Path(name))
    try:
        content = parse(read_text(path))
        kind = _kind(content)
        return kind.model_validate(typed(content, kind))
    except FileNotFoundError as error:
        known = ", ".join(shipped_trees())
        raise ConfigError(f"no tree {name!r}; shipped ones: {known}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or refused
        raise ConfigError(f"tree {path}: {error}") from error


def _kind(content: object) -> type[StaticTree] | type[DynamicTree]:
    """Which tree a file describes: its keys say so. Keys that are no tree's do not count here."""
    keys = content.keys() if isinstance(content, Mapping) else set()
    static, dynamic = set(StaticTree.model_fields), set(DynamicTree.model_fields)
    given = keys & (static | dynamic)
    if given == static:
        return StaticTree
    if given == dynamic:
        return DynamicTree
    raise ValueError("give either parents, or num_nodes, max_depth and top_k")
