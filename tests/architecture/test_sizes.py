"""Budgets that keep files and functions readable."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterable, Mapping, Sequence

import pytest

from tests.architecture.source_tree import ALL, PRODUCT, ROOT, SEPARATE, Module, modules

OURS = (*PRODUCT, *SEPARATE)
MAX_FILE = 600  # lines; few files come near
MAX_FUNCTION = {"kernels": 150}  # Triton kernels
OTHER_FUNCTION = 60
MAX_MEDIAN, MAX_OF_NINE_TENTHS = 10, 30
CPP = (".cpp", ".h", ".hpp", ".cu", ".cuh")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def long_files(lengths: Mapping[str, int]) -> list[str]:
    """Paths above the budget."""
    return [f"{path}: {length} lines" for path, length in lengths.items() if length > MAX_FILE]


def functions(module: Module) -> list[tuple[Function, int]]:
    """Every function, nested ones included, with its number of lines."""
    found = [node for node in module.nodes if isinstance(node, Function)]
    return [(node, (node.end_lineno or node.lineno) - node.lineno + 1) for node in found]


def long_functions(module: Module) -> list[str]:
    limit = MAX_FUNCTION.get(module.package, OTHER_FUNCTION)
    return [
        module.at(node, f"{node.name} has {length} lines, at most {limit}")
        for node, length in functions(module)
        if length > limit
    ]


def function_lengths(found: Iterable[Module]) -> list[int]:
    return [length for module in found for _, length in functions(module)]


def overweight(lengths: Sequence[int]) -> list[str]:
    """What is wrong with the distribution of function lengths."""
    median = statistics.median(lengths)
    short = sum(length <= MAX_OF_NINE_TENTHS for length in lengths) / len(lengths)
    problems = [f"median {median}"] if median > MAX_MEDIAN else []
    return problems + ([f"only {short:.0%} are short"] if short < 0.9 else [])


def test_no_python_file_is_long() -> None:
    assert long_files({m.path: len(m.text.splitlines()) for m in modules(ALL)}) == []


def test_no_cpp_file_is_long() -> None:
    paths = [path for top in PRODUCT for path in (ROOT / top).rglob("*") if path.suffix in CPP]
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in paths
    }
    assert lengths
    assert long_files(lengths) == []


def test_no_function_is_long() -> None:
    assert [line for module in modules(OURS) for line in long_functions(module)] == []


@pytest.mark.parametrize("package", OURS)
def test_most_functions_of_a_package_are_short(package: str) -> None:
    lengths = function_lengths(modules((package,)))
    if not lengths:
        pytest.skip(f"{package} has no functions yet")
    assert overweight(lengths) == []


def test_a_long_file_is_seen() -> None:
    assert long_files({"engine/a.py": 600, "kernels/b.cpp": 600}) == []
    assert len(long_files({"engine/a.py": 601, "kernels/b.cpp": 601})) == 2


def function_of(lines: int, indent: str = "") -> str:
    return "\n".join([f"{indent}def f():", *[f"{indent}    pass"] * (lines - 1)])


@pytest.mark.parametrize(
    ("path", "lines", "num_long"),
    [
        ("engine/a.py", 60, 0),
        ("engine/a.py", 61, 1),
        ("kernels/a.py", 150, 0),
        ("kernels/a.py", 151, 1),
    ],
)
def test_a_long_function_is_seen(path: str, lines: int, num_long: int) -> None:
    assert len(long_functions(Module(path, function_of(lines)))) == num_long
    method = "class A:\n" + function_of(lines, "    ").replace("def", "async def")
    assert len(long_functions(Module(path, method))) == num_long


def test_many_long_functions_are_seen() -> None:
    assert overweight([10] * 9 + [60]) == []
    assert overweight([11] * 10) == ["median 11.0"]
    assert overweight([1] * 8 + [31] * 2) == ["only 80% are short"]
    source = "\n".join([function_of(3), function_of(12)])
    assert function_lengths([Module("engine/a.py", source)]) == [3, 12]
