"""Draft trees that the configuration can name: files under configs/tree."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import Field, model_validator

from configs.load import ConfigError
from configs.schema import Integer, Section
from configs.values import parse, typed


class TreeConfig(Section):
    """A static tree (`parents`), or a dynamic one (`num_nodes`, `max_depth`, `top_k`)."""

    parents: tuple[Integer, ...] | None = Field(
        None, description="parent of every node; -1 for the root, which is node 0"
    )
    num_nodes: Integer | None = Field(None, description="nodes to keep, the root included")
    max_depth: Integer | None = None
    top_k: Integer | None = Field(None, description="children per node, and width of a level")

    @model_validator(mode="after")
    def _one_kind(self) -> TreeConfig:
        dynamic = (self.num_nodes, self.max_depth, self.top_k)
        if (self.parents is None) == (None in dynamic) or (
            self.parents is not None and dynamic != (None, None, None)
        ):
            raise ValueError("give either parents, or num_nodes, max_depth and top_k")
        return self


def shipped_trees() -> dict[str, Path]:
    """Names and paths of the files under configs/tree."""
    folder = Path(__file__).parent / "tree"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def load_tree(name: str) -> TreeConfig:
    """The tree of a shipped file, or of a path. ConfigError if it is missing or invalid."""
    path = shipped_trees().get(name, Path(name))
    try:
        tree = parse(path.read_text(encoding="utf-8"))
        return TreeConfig.model_validate(typed(tree, TreeConfig))
    except FileNotFoundError as error:
        known = ", ".join(shipped_trees())
        raise ConfigError(f"no tree {name!r}; shipped ones: {known}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or refused
        raise ConfigError(f"tree {path}: {error}") from error
