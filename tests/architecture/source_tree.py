"""The Python files of this repository, for the checks: paths and syntax trees."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("configs", "kernels", "engine", "drafter", "server")
SEPARATE = ("syncspec",)  # a system of its own: imports nothing of ours, is imported by nothing
ALL = (*PRODUCT, *SEPARATE, "tests", "benchmarks")


@dataclass(frozen=True)
class Module:
    """One file. `path` is relative to the repository, with slashes."""

    path: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @functools.cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        return tuple(ast.walk(self.tree))

    @property
    def package(self) -> str:
        """The top-level folder."""
        return self.path.split("/")[0]

    @property
    def stem(self) -> str:
        return self.path.rpartition("/")[2].removesuffix(".py")

    @property
    def name(self) -> str:
        """The dotted name by which it is imported."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def is_package(self) -> bool:
        return self.stem == "__init__"

    def at(self, node: ast.AST, problem: str) -> str:
        """The place of a node as a line for a report."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {problem}"


@functools.cache
def modules(packages: tuple[str, ...] = PRODUCT) -> tuple[Module, ...]:
    """Every Python file of the given top-level folders."""
    return tuple(
        Module(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
    )


def imports(
    module: Module, nodes: tuple[ast.AST, ...] | None = None
) -> Iterator[tuple[ast.AST, str]]:
    """All dotted names that the file imports; `from a import b` gives `a.b`, since `b` may be a
    module."""
    for node in module.nodes if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = _absolute(module, node)
            yield from ((node, f"{parent}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _is_dynamic_import(node):
            yield node, str(node.args[0].value) if _is_text(node.args[:1]) else "?"


def run_at_import(tree: ast.AST) -> tuple[ast.AST, ...]:
    """The nodes that run when the module is imported: all but function bodies and code for type
    checkers."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found += [node, *run_at_import(node)]
    return tuple(found)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    depth = node.level - 1 if module.is_package else node.level
    parts = module.name.split(".")
    base = parts[: len(parts) - depth]
    return ".".join([*base, node.module] if node.module else base)


def _is_dynamic_import(node: ast.Call) -> bool:
    return ast.unparse(node.func) in ("__import__", "import_module", "importlib.import_module")


def _is_text(arguments: list[ast.expr]) -> bool:
    return any(isinstance(a, ast.Constant) and isinstance(a.value, str) for a in arguments)
