"""Rules for product code: forbidden constructs and names."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable

import pytest

from tests.architecture.source_tree import ALL, PRODUCT, SEPARATE, Module, imports, modules

Rule = Callable[[Module], list[str]]

PICKLES = frozenset({"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"})
UNSAFE_CALLS = frozenset({"eval", "exec", "torch.load", "torch.save", "os.system", "os.popen"})
# keyword -> the only allowed value; computed values are not allowed either
KEYWORDS = {"strict": True, "shell": False, "trust_remote_code": False, "allow_pickle": False}
ENVIRONMENT = frozenset({"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"})
LIBRARIES = frozenset(
    [
        "fastapi",
        "gguf",
        "huggingface_hub",
        "jinja2",
        "msgspec",
        "numpy",
        "prometheus_client",
        "pydantic",
        "rich",
        "safetensors",
        "starlette",
        "tokenizers",
        "torch",
        "transformers",
        "triton",
        "typer",
        "uvicorn",
        "uvloop",
        "yaml",
        "zmq",
    ]
)
VAGUE_NAMES = frozenset({"util", "utils", "helper", "helpers", "common", "misc"})


def init_with_code(module: Module) -> list[str]:
    """`__init__` files hold only a docstring: transformers looks for a package named `kernels`."""
    if not module.is_package:
        return []
    only_docstring = len(module.tree.body) == 1 and ast.get_docstring(module.tree)
    return [] if only_docstring else [module.at(module.tree, "must be a docstring only")]


def bad_module_name(module: Module) -> list[str]:
    """A module's name must say what it holds, and must not be the name of a library."""
    if module.stem in LIBRARIES | VAGUE_NAMES:
        return [module.at(module.tree, f"a module must not be named {module.stem}")]
    return []


def bad_class_name(module: Module) -> list[str]:
    return [
        module.at(node, f"class {node.name}: no Base*, no *Impl")
        for node in module.nodes
        if isinstance(node, ast.ClassDef)
        and (node.name.lstrip("_").startswith("Base") or node.name.endswith("Impl"))
    ]


def environment_read(module: Module) -> list[str]:
    """Environment variables are read in configs/ only."""
    if module.package == "configs":
        return []
    names = {f"os.{name}" for name in ENVIRONMENT}
    used = [node for node in module.nodes if dotted(node) in names]
    imported = [node for node, name in imports(module) if name in names]
    return [
        module.at(node, "environment variables are read in configs/") for node in used + imported
    ]


def process_state(module: Module) -> list[str]:
    nodes = [node for node in module.nodes if isinstance(node, ast.Global)]
    return [module.at(node, "no global statement") for node in nodes]


def bare_except(module: Module) -> list[str]:
    nodes = [n for n in module.nodes if isinstance(n, ast.ExceptHandler) and n.type is None]
    return [module.at(node, "except needs a type") for node in nodes]


def loose_keyword(module: Module) -> list[str]:
    """strict=False, shell=True and the like, in a call or in a dict of arguments."""
    found: list[tuple[ast.AST, str, ast.expr]] = []
    for node in module.nodes:
        if isinstance(node, ast.Call):
            found += [(node, word.arg, word.value) for word in node.keywords if word.arg]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            found += [(node, k.value, v) for k, v in pairs if isinstance(k, ast.Constant)]
    return [
        module.at(node, f"{name} = {ast.unparse(value)}")
        for node, name, value in found
        if name in KEYWORDS and not is_constant(value, KEYWORDS[name])
    ]


def unsafe_call(module: Module) -> list[str]:
    """Calls that may run code from data."""
    calls = [node.func for node in module.nodes if isinstance(node, ast.Call)]
    called = [(node, dotted(node)) for node in calls if dotted(node) in UNSAFE_CALLS]
    pickles = [(node, name) for node, name in imports(module) if name.split(".")[0] in PICKLES]
    loaded = [(node, name) for node, name in imports(module) if name in UNSAFE_CALLS]
    return [module.at(node, f"{name} may run code") for node, name in called + pickles + loaded]


def trusting_load(module: Module) -> list[str]:
    """transformers may run code from a model's folder unless it is told not to, each time."""
    calls = [node for node in module.nodes if isinstance(node, ast.Call)]
    return [
        module.at(node, "from_pretrained needs trust_remote_code=False")
        for node in calls
        if dotted(node.func).endswith(".from_pretrained")
        and "trust_remote_code" not in {word.arg for word in node.keywords}
    ]


def dotted(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def is_constant(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


EVERYWHERE: tuple[Rule, ...] = (init_with_code, bad_module_name)
IN_PRODUCT: tuple[Rule, ...] = (
    bad_class_name,
    environment_read,
    process_state,
    bare_except,
    loose_keyword,
    unsafe_call,
    trusting_load,
)
OURS = (*PRODUCT, *SEPARATE)
PLANTED: list[tuple[Rule, str, str]] = [
    (init_with_code, "engine/__init__.py", ""),
    (init_with_code, "engine/__init__.py", "import os"),
    (init_with_code, "engine/__init__.py", '"""Engine."""\n__version__ = "1"'),
    (bad_module_name, "engine/utils.py", ""),
    (bad_module_name, "kernels/attention/triton.py", ""),
    (bad_module_name, "server/text/tokenizers.py", ""),
    (bad_class_name, "engine/a.py", "class BaseRunner: ..."),
    (bad_class_name, "engine/a.py", "def f():\n    class _BaseRunner: ..."),
    (bad_class_name, "engine/a.py", "class RunnerImpl: ..."),
    (environment_read, "engine/a.py", "import os\nx = os.environ['A']"),
    (environment_read, "engine/a.py", "import os\ndef f(): return os.getenv('A')"),
    (environment_read, "engine/a.py", "from os import environ"),
    (process_state, "engine/a.py", "def f():\n    global x\n    x = 1"),
    (bare_except, "engine/a.py", "try:\n    f()\nexcept:\n    pass"),
    (loose_keyword, "engine/a.py", "model.load_state_dict(s, strict=False)"),
    (loose_keyword, "engine/a.py", "f(trust_remote_code=True)"),
    (loose_keyword, "engine/a.py", "f(trust_remote_code=config.trusted)"),
    (loose_keyword, "engine/a.py", "f(**{'trust_remote_code': True})"),
    (loose_keyword, "engine/a.py", "subprocess.run(c, shell=True)"),
    (unsafe_call, "engine/a.py", "import pickle"),
    (unsafe_call, "engine/a.py", "def f():\n    from pickle import loads"),
    (unsafe_call, "engine/a.py", "w = torch.load(path, weights_only=True)"),
    (unsafe_call, "engine/a.py", "from torch import load"),
    (unsafe_call, "engine/a.py", "eval('1')"),
    (unsafe_call, "engine/a.py", "exec(text)"),
    (unsafe_call, "engine/a.py", "import os\nos.system('ls')"),
    (trusting_load, "engine/a.py", "x = AutoTokenizer.from_pretrained(p)"),
    (trusting_load, "engine/a.py", "x = T.from_pretrained(p, **{'trust_remote_code': False})"),
]
HARMLESS: list[tuple[Rule, str, str]] = [
    (init_with_code, "engine/__init__.py", '"""Engine."""'),
    (init_with_code, "engine/a.py", "import os"),
    (bad_module_name, "kernels/attention/triton_kernel.py", ""),
    (bad_class_name, "engine/a.py", "class Database: ..."),
    (environment_read, "configs/a.py", "import os\nx = os.environ['A']"),
    (environment_read, "engine/a.py", "import os\nx = os.linesep"),
    (bare_except, "engine/a.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (loose_keyword, "engine/a.py", "zip(a, b, strict=True)\nf(shell=False, strictness=False)"),
    (trusting_load, "engine/a.py", "T.from_pretrained(p, trust_remote_code=False)"),
    (unsafe_call, "engine/a.py", "model.eval()\nregex.exec('')\njson.load(f)"),
]


@pytest.mark.parametrize("rule", EVERYWHERE, ids=lambda rule: rule.__name__)
def test_all_code_keeps_the_rule(rule: Rule) -> None:
    assert [line for module in modules(ALL) for line in rule(module)] == []


@pytest.mark.parametrize("rule", IN_PRODUCT, ids=lambda rule: rule.__name__)
def test_product_code_keeps_the_rule(rule: Rule) -> None:
    assert [line for module in modules(OURS) for line in rule(module)] == []


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_a_planted_violation_is_seen(rule: Rule, path: str, text: str) -> None:
    assert len(rule(Module(path, text))) == 1


@pytest.mark.parametrize(("rule", "path", "text"), HARMLESS)
def test_what_only_looks_alike_is_left_alone(rule: Rule, path: str, text: str) -> None:
    assert rule(Module(path, text)) == []


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, _, _ in PLANTED} == {*EVERYWHERE, *IN_PRODUCT}


def test_every_package_is_read() -> None:
    assert {module.package for module in modules(ALL)} == {*ALL}
    assert len(modules()) > 50
    assert not {module.package for module in modules()} & sys.stdlib_module_names
