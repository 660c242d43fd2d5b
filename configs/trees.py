"""Draft trees that can be named in the configuration: files under configs/tree."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError

from configs.load import ConfigError
from configs.schema import Section


class StaticTree(Section):
    """The same tree for every token."""

    parents: tuple[int, ...] = Field(
        description="parent of every node; -1 for the root, which is node 0"
    )


class DynamicTree(Section):
    """The likeliest nodes, chosen anew for every token."""

    num_nodes: int = Field(description="nodes to keep, the root included")
    max_depth: int
    top_k: int = Field(description="children per node, and width of a level")


def _kind(keys: object) -> str | None:
    """Which tree a file with these keys describes; None for neither, or for something of both."""
    if not isinstance(keys, Mapping):
        return None
    static, dynamic = StaticTree.model_fields.keys(), DynamicTree.model_fields.keys()
    given = keys.keys() & (static | dynamic)
    return "static" if given == static else "dynamic" if given == dynamic else None


TreeConfig = StaticTree | DynamicTree
TREES: TypeAdapter[TreeConfig] = TypeAdapter(
    Annotated[
        Annotated[StaticTree, Tag("static")] | Annotated[DynamicTree, Tag("dynamic")],
        Discriminator(
            _kind,
            custom_error_type="kind_of_tree",
            custom_error_message="give either parents, or num_nodes, max_depth and top_k",
        ),
    ]
)


def shipped_trees() -> dict[str, Path]:
    """Names and paths of the files under configs/tree."""
    folder = Path(str(files("configs") / "tree"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def load_tree(name: str) -> TreeConfig:
    """The tree of a shipped file, or of a path. ConfigError when there is none, or a bad one."""
    path = shipped_trees().get(name, Path(name))
    try:
        return TREES.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        known = ", ".join(shipped_trees())
        raise ConfigError(f"no tree {name!r}; shipped ones: {known}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"tree {path}: {error}") from error
