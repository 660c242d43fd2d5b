"""Tests that loading leaves no holes in memory; in a process of its own, whose memory nothing else
has used."""

import platform
import subprocess
import sys

import pytest

LOADS = """
import torch
from engine.models.freed_memory import freed_at_once

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def load():
    # What glibc learns from: a large tensor that is freed makes it keep such tensors among others.
    torch.ones(7 << 20)
    kept = []
    for _ in range(20):
        large = torch.ones(1 << 20)  # 4 MiB
        kept.append(torch.ones(1 << 10))
    return kept

torch.ones(1 << 10)
before = resident()
with freed_at_once():
    kept = load()
print((resident() - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
def test_large_tensors_that_loading_frees_go_back_to_the_system() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADS], capture_output=True, text=True, timeout=150, check=True
    )
    assert int(done.stdout) < 8
