"""The wheel that users install: one package, `aerie`, which works as the source does."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from configs.schema import Config
from engine.request import Request, SamplingParams
from server.assembly.offline import OfflineEngine
from tests.architecture.source_tree import PRODUCT, ROOT, SEPARATE, Module, imports, modules
from tests.support.servers.live_server import child_environment
from tests.support.waiting import DEADLINE

FILES = ("pyproject.toml", "setup.py", "aerie.py", "README.md", "LICENSE")
MADE_HERE = shutil.ignore_patterns("__pycache__", "*.so", "prebuilt")
PROMPT, NUM_TOKENS = [5, 17, 3, 40, 8], 12

# Imports every module but those that need an extra, then generates; prints the top-level names and
# the tokens as JSON.
IN_THE_WHEEL = """
import importlib, json, pkgutil, sys
import aerie, kernels
found = [m.name for m in pkgutil.walk_packages(aerie.__path__, 'aerie.')]
extras = ('aerie.syncspec', 'aerie.server.ray.', 'aerie.engine.kv.nixl_memory')
found = [name for name in found if not name.startswith(extras)]
for name in found:
    importlib.import_module(name)
from aerie.configs.schema import Config
from aerie.engine.request import Request, SamplingParams
from aerie.server.assembly.offline import OfflineEngine
engine = OfflineEngine.from_config(Config.model_validate_json(sys.argv[1]))
params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
done = engine.generate([Request(request_id='r', prompt_ids=PROMPT, params=params)])
tops = {name.partition('.')[0] for name in sys.modules}
print(json.dumps({'modules': found, 'tokens': done['r'].token_ids, 'kernels': kernels.OWNER,
                  'tops': sorted(tops)}))
"""


def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("aerie_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nested = setup_script().nested


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the source, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*PRODUCT, *SEPARATE):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=MADE_HERE)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"")  # packing them takes seconds
    for name in FILES:
        shutil.copy(ROOT / name, folder / "source")
    stale = folder / "source" / "build" / "lib"  # leftovers of an earlier build must not be packed
    (stale / "server").mkdir(parents=True)
    (stale / "server" / "gone.py").write_text("")
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    pip("wheel", *offline, "--wheel-dir", str(folder), str(folder / "source"))
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder where the wheel is installed, beside an unrelated package `kernels`."""
    folder = wheel.parent / "installed"
    pip("install", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("OWNER = 'somebody else'\n")
    return folder


def environment(installed: Path) -> dict[str, str]:
    """An environment with the wheel first on the path, and the source not on it."""
    packages = sysconfig.get_path("purelib")
    return child_environment({"PYTHONPATH": f"{installed}:{packages}"})


def run(installed: Path, arguments: Sequence[str]) -> str:
    """Run without `site`, which would add the source of an editable installation."""
    done = subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=installed.parent,
        env=environment(installed),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_but_aerie_is_at_the_top(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top,) = [name for name in names if name.endswith("/top_level.txt")]
        assert archive.read(top).split() == [b"aerie"]
    tops = {name.partition("/")[0] for name in names}
    assert {re.sub(r"-.*\.dist-info", "-info", top) for top in tops} == {"aerie", "aerie-info"}
    assert not [name for name in names if name.endswith("/gone.py")]


def test_every_file_of_the_source_is_in_the_wheel(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", *PRODUCT, "syncspec/*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("no checkout of git")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    files = [name for name in listed.stdout.split() if (ROOT / name).exists()]
    assert [name for name in files if f"aerie/{name}" not in packed] == []


def test_the_installed_package_works_as_the_source_does(
    installed: Path, tiny_folder: Path, native_cache: Path
) -> None:
    config = Config.model_validate(
        {
            "model": {"source": str(tiny_folder), "dtype": "float32"},
            "cache": {"num_blocks": 64},
            "kernels": {"backend": "reference", "threads": 1},
            "files": {"dir": str(native_cache)},
        }
    )
    program = IN_THE_WHEEL.replace("PROMPT", str(PROMPT)).replace("NUM_TOKENS", str(NUM_TOKENS))
    out = run(installed, ["-c", program, config.model_dump_json()])
    found = json.loads(out.splitlines()[-1])
    extras = ("server.ray.", "engine.kv.nixl_memory")
    names = {module.name for module in modules() if not module.name.startswith(extras)}
    names |= {"__main__"}
    assert {f"aerie.{name}" for name in names} <= {*found["modules"], "aerie.__init__"}
    assert found["kernels"] == "somebody else"
    assert set(PRODUCT) & set(found["tops"]) == {"kernels"}
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    request = Request(request_id="r", prompt_ids=PROMPT, params=params)
    completion = OfflineEngine.from_config(config).generate([request])["r"]
    assert found["tokens"] == completion.token_ids
    assert len(completion.token_ids) == NUM_TOKENS


def test_python_m_aerie_says_its_version(installed: Path) -> None:
    version = next(installed.glob("aerie-*.dist-info")).name.split("-")[1].removesuffix(".dist")
    assert run(installed, ["-m", "aerie", "--version"]) == f"{version}\n"
    assert run(installed, [str(installed / "bin" / "aerie"), "--version"]) == f"{version}\n"


def test_the_installed_server_finds_its_processes(
    installed: Path, tiny_folder: Path, native_cache: Path
) -> None:
    """Rank 0 is a child of the server, the follower a child of rank 0."""
    settings = ["model.dtype=float32", "cache.num_blocks=64", "parallel.tensor=2"]
    settings += [f"model.source={tiny_folder}", f"files.dir={native_cache}"]
    settings += ["kernels.backend=reference", "server.restart_engine=false"]
    settings += [f"parallel.timeout={DEADLINE}"]
    server = subprocess.Popen(
        [sys.executable, "-S", "-m", "aerie", "serve", "--port", "0", *settings],
        cwd=installed.parent,
        env=environment(installed),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with server:
        try:
            assert server.stdout is not None
            ready = next((line for line in server.stdout if line.startswith("READY ")), None)
            assert ready is not None, server.stderr and server.stderr.read()
            body = {"model": str(tiny_folder), "prompt": PROMPT, "max_tokens": 3, "temperature": 0}
            url = ready.split()[1]
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE)
            assert answer.status_code == 200, answer.text
        finally:
            server.terminate()


def test_imports_are_the_only_change() -> None:
    for module in modules():
        text = nested(module.text)
        assert text.replace("from aerie.", "from ") == module.text, module.path
        found = imports(Module(module.path, text))
        assert [name for _, name in found if name.partition(".")[0] in PRODUCT] == [], module.path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from engine.request import A\n", "from aerie.engine.request import A\n"),
        ("from engine import core as c", "from aerie.engine import core as c"),
        (
            "def f():\n\tfrom server.app import (\n\t\ta,\n\t)\n",
            "def f():\n\tfrom aerie.server.app import (\n\t\ta,\n\t)\n",
        ),
        (
            "x = 'ü'; from kernels.ops import O; from drafter import a\r\n",
            "x = 'ü'; from aerie.kernels.ops import O; from aerie.drafter import a\r\n",
        ),
    ],
)
def test_imports_of_our_folders_are_nested(source: str, expected: str) -> None:
    assert nested(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "from enginex import a\nimport engines\nfrom . import server\n",
        "'''\nfrom engine import core\n'''\n# from server import app\n",
        "from torch import engine\nkernels = server = 1\n",
    ],
)
def test_other_text_is_left_alone(source: str) -> None:
    assert nested(source) == source


@pytest.mark.parametrize(
    "source", ["import engine.core\n", "import os, server.app as app\n", "from  engine import x\n"]
)
def test_imports_that_cannot_be_nested_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match="line 1: write `from"):
        nested(source)


def test_the_metadata_is_that_of_a_public_project(installed: Path) -> None:
    (found,) = importlib.metadata.distributions(name="aerie", path=[str(installed)])
    about = found.metadata
    assert (about["Author"], about["License-Expression"]) == ("Aerie contributors", "Apache-2.0")
    assert about["Keywords"]
    assert len(about.get_all("Classifier") or []) > 5
    assert not {"Project-URL", "Home-page"} & set(about)
    assert about.get_payload().startswith("# Aerie")  # type: ignore[attr-defined]
