"""The command line, without starting a server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.load import load_config
from configs.schema import Config
from server.version import UNKNOWN, version
from tests.architecture.source_tree import modules
from tests.support.servers.live_server import aerie_command, child_environment, run_aerie

COMMANDS = ("serve", "chat", "bench", "models", "pull", "config", "prepare", "plan", "version")
HEAVY = ("torch", "transformers", "kernels", "drafter", "zmq", "fastapi")


def test_help_names_every_command() -> None:
    done = run_aerie("--help")
    assert done.returncode == 0
    wanted = (*COMMANDS, "--install-completion")
    assert [name for name in wanted if name not in done.stdout] == []


def test_help_of_serve_names_options_and_gives_examples() -> None:
    done = run_aerie("serve", "--help", extra={"COLUMNS": "100", "NO_COLOR": "1"})
    assert done.returncode == 0
    wanted = ["--config", "--host", "--port", "--api-key", "SECTION.KEY=VALUE", "READY"]
    wanted += ["aerie serve --config smollm2-fp32 --port 8123", "AERIE_SECTION__KEY", "SIGTERM"]
    assert [text for text in wanted if text not in done.stdout] == []
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["config"], ["version"]])
def test_quick_commands_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom server.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=child_environment(),
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_config_prints_every_key_as_yaml() -> None:
    done = run_aerie("config", "cache.num_blocks=77", extra={"AERIE_SERVER__PORT": "1234"})
    assert done.returncode == 0
    found = yaml.safe_load(done.stdout)
    keys = {name: list(section) for name, section in found.items()}
    assert keys == {
        name: list(type(getattr(Config(), name)).model_fields) for name in Config.model_fields
    }
    assert (found["cache"]["num_blocks"], found["server"]["port"]) == (77, 1234)
    again = Config.model_validate(found)
    assert again.cache.num_blocks == 77


def test_config_leaves_keys_out_so_that_its_output_can_be_a_file(tmp_path: Path) -> None:
    keys = {"AERIE_SERVER__API_KEYS": "sk-secret, other"}
    done = run_aerie("config", "server.admin_keys=[sk-root]", extra=keys)
    assert "sk-" not in done.stdout
    assert "  # api_keys: 2 of them, not shown  # accepted bearer tokens" in done.stdout
    path = tmp_path / "mine.yaml"
    path.write_text(done.stdout)
    config = load_config(path)
    assert (config.server.api_keys, config.server.admin_keys) == ((), ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cache.num_block=1"], "unknown key 'cache.num_block'; known here: block_size"),
        (["num_blocks=1"], "'num_blocks' does not name a key of a section"),
        (["cache.num_blocks"], "override 'cache.num_blocks' is not of the form section.key=value"),
        (["cache.num_blocks=0"], "cache.num_blocks = 0"),
        (["cache.num_blocks=many"], "cache.num_blocks = 'many'"),
        (["server.api_keys=[1"], "the value of server.api_keys is not YAML"),
        (["kernels.backend=cuda"], "kernels.backend = 'cuda'"),
        (["--config", "nowhere"], "no configuration file 'nowhere'; shipped ones: llama31-8b"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    """Of `aerie config`; tests/e2e/test_startup_failures.py shows that `serve` refuses them."""
    done = run_aerie("config", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("aerie: ")
    assert message in line


@pytest.mark.parametrize("key", ["api_keys", "admin_keys"])
def test_keys_are_not_shown_in_messages(key: str) -> None:
    done = run_aerie("config", f"server.{key}={{secret: x}}")
    assert done.returncode == 2
    assert "secret" not in done.stderr


@pytest.mark.parametrize("arguments", [["serve", "--nonsense"], ["unknown"]])
def test_unknown_options_and_commands_are_exit_code_2(arguments: list[str]) -> None:
    done = run_aerie(*arguments)
    assert done.returncode == 2
    assert arguments[-1] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["version", "--version"])
def test_version_is_one_line(word: str) -> None:
    done = run_aerie(word)
    assert (done.returncode, done.stdout) == (0, f"{version()}\n")


NOT_INSTALLED = """
import importlib.metadata as metadata
find = metadata.distribution
def distribution(name):
    if name == 'aerie':
        raise metadata.PackageNotFoundError(name)
    return find(name)
metadata.distribution = distribution
"""


def test_code_that_is_not_installed_has_an_unknown_version() -> None:
    done = run_aerie("--version", prelude=NOT_INSTALLED)
    assert (done.stderr, done.stdout) == ("", f"{UNKNOWN}\n")


def test_only_one_place_asks_for_the_version() -> None:
    asking = [m.path for m in modules() if re.search(r"version\(\s*[\"']aerie", m.text)]
    assert asking == ["server/version.py"]


def test_streams_that_are_closed_are_replaced() -> None:
    command = [*aerie_command("version"), "<&-", ">&-", "2>&-"]
    shell = f"{' '.join(command)}; echo $?"
    done = subprocess.run(
        ["/bin/sh", "-c", shell], capture_output=True, text=True, env=child_environment()
    )
    assert (done.stdout, done.stderr) == ("0\n", "")
