"""What the tutorial and README.md show is what a newcomer gets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernels.ops import Ops
from tests.architecture.source_tree import ROOT
from tests.support.servers.live_server import LiveServer, child_environment, run_aerie
from tests.support.waiting import DEADLINE

TUTORIAL = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
NUM_BLOCKS = "cache.num_blocks=512"
ADDRESS = "http://127.0.0.1:8000"


def shown(document: str, start: str) -> str:
    """The block of `document` that begins with `start`, without it."""
    (block,) = [text for _, text in BLOCK.findall(document) if text.startswith(start)]
    return str(block.removeprefix(start))


def general(text: str) -> str:
    """`text` without what differs between machines and runs: numbers, and folders of paths."""
    return re.sub(r"\d+", "N", re.sub(r"(?<= )\S+(?=/drafter/)", "...", text))


def run_python(program: str, folder: Path) -> str:
    """What a program of a document prints, run as a newcomer runs it, in the repository."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=child_environment({"AERIE_FILES__DIR": str(folder), "AERIE_CACHE__NUM_BLOCKS": "512"}),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def served(native_cache: Path, native_ops: Ops) -> Iterator[LiveServer]:
    """`aerie serve` without options, but for a port, a small cache and compiled kernels; on a CPU,
    as the tutorial shows it."""
    settings = (NUM_BLOCKS, f"files.dir={native_cache}")
    with LiveServer(*settings, verbose=False, extra={"CUDA_VISIBLE_DEVICES": ""}) as live:
        yield live
        assert live.stop() == 0


def test_a_start_prints_what_the_tutorial_shows(served: LiveServer) -> None:
    printed = served.log.text() + served.out.text()
    assert general(printed) == general(shown(TUTORIAL, "$ aerie serve\n"))


def test_the_program_that_asks_prints_what_its_comment_says(
    served: LiveServer, native_cache: Path
) -> None:
    program = shown(TUTORIAL, "from openai import OpenAI\n")
    assert ADDRESS in program
    asked = "from openai import OpenAI\n" + program.replace(ADDRESS, served.url)
    assert run_python(asked, native_cache).strip() == program.rpartition("# ")[2].strip()


def test_the_program_without_a_server_prints_what_the_tutorial_says(native_cache: Path) -> None:
    start = "from configs.host import host_config\n"
    first = run_python(start + shown(TUTORIAL, start), native_cache).splitlines()[0]
    assert f"It prints `{first}`" in TUTORIAL


def test_a_benchmark_begins_as_the_tutorial_shows(served: LiveServer) -> None:
    wanted = shown(TUTORIAL, "$ aerie bench latency\n").splitlines()[:3]
    assert ADDRESS in wanted[0]
    few = ["--streams", "1", "--requests", "1", "--output-tokens", "2"]
    done = run_aerie("bench", "latency", "--url", served.url, *few)
    assert done.returncode == 0, done.stderr
    assert [general(line) for line in done.stdout.splitlines()[:3]] == list(map(general, wanted))


def test_an_answer_has_the_fields_that_the_readme_shows(served: LiveServer) -> None:
    example = shown(README, "$ curl http://127.0.0.1:8123/v1/chat/completions ")
    sent, received = re.findall(r"^\{.*?\}(?='?$)", example.replace("-d '", "\n"), re.M | re.S)
    answer = served.post("/v1/chat/completions", json.loads(sent)).json()
    document = json.loads(received.replace("\n", ""))
    assert fields(answer) == fields(document)
    assert answer["choices"] == document["choices"]


def fields(value: Any) -> Any:
    """Names of all fields, in order."""
    if isinstance(value, dict):
        return [(name, fields(each)) for name, each in value.items()]
    return [fields(each) for each in value] if isinstance(value, list) else None
