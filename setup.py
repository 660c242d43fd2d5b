"""What is installed is one package, `aerie`, with the folders of the source inside it.

`kernels` is also a package of Hugging Face, and `server` is anybody's name: a wheel holds
aerie/kernels and aerie/server, and its `from server.x import y` is `from aerie.server.x import y`.
An editable installation uses the source as it is, with the names of its folders.
"""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TOP = "aerie"
FOLDERS = ("configs", "kernels", "engine", "drafter", "server", "syncspec")
ImportStatement = ast.Import | ast.ImportFrom


def nested(source: str) -> str:
    """The source of a module with imports from our folders turned into imports from `aerie`.

    Raises:
        ValueError: `import server.x`, which would bind another name than before.
    """
    lines = source.encode().splitlines(keepends=True)
    for node in sorted(_our_imports(ast.parse(source)), key=_place, reverse=True):
        line, start = lines[node.lineno - 1], node.col_offset + len(b"from ")
        if not line.startswith(f"from {_modules(node)[0]}".encode(), node.col_offset):
            raise ValueError(f"line {node.lineno}: write `from {_modules(node)[0]} import ...`")
        lines[node.lineno - 1] = line[:start] + f"{TOP}.".encode() + line[start:]
    return b"".join(lines).decode()


def _our_imports(tree: ast.Module) -> list[ImportStatement]:
    found = [node for node in ast.walk(tree) if isinstance(node, ImportStatement)]
    return [node for node in found if any(name.split(".")[0] in FOLDERS for name in _modules(node))]


def _modules(node: ImportStatement) -> list[str]:
    """What the statement names, unless it is a relative import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if node.module and not node.level else []


def _place(node: ImportStatement) -> tuple[int, int]:
    return node.lineno, node.col_offset


class BuildPy(build_py):
    """Rewrites what it copies. An editable installation copies nothing."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # modules of earlier sources
        super().run()

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        if module == TOP:  # aerie.py: what is imported, and what `python -m aerie` runs
            super().build_module("__main__", module_file, TOP)
            self._rewrite(Path(self.build_lib) / TOP / "__main__.py")
            module, package = "__init__", TOP
        outfile, copied = super().build_module(module, module_file, package)
        self._rewrite(Path(self.build_lib, *package.split("."), f"{module}.py"))
        return outfile, copied

    def _rewrite(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        try:
            path.write_text(nested(text), encoding="utf-8", newline="")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def main() -> None:
    packages = find_packages(str(ROOT), include=[f"{folder}*" for folder in FOLDERS])
    if "editable_wheel" in sys.argv:
        setup(packages=packages, py_modules=[TOP])
        return
    setup(
        packages=[f"{TOP}.{package}" for package in packages],
        package_dir={f"{TOP}.{folder}": folder for folder in FOLDERS},
        py_modules=[TOP],
        cmdclass={"build_py": BuildPy},
    )


if __name__ == "__main__":
    main()
