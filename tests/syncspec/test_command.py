"""The command `syncspec` where its extra, or a part of it, is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.architecture.source_tree import ROOT
from tests.support.waiting import DEADLINE

WITHOUT_SCIPY = "import sys; sys.modules['scipy'] = None; import aerie; aerie.syncspec()"


def said(missing: str) -> str:
    return f"error: {missing} is missing: pip install 'aerie[syncspec]'\n"


def test_without_its_extra_it_says_so_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SCIPY, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said("scipy"))


def test_a_library_of_one_command_is_named_when_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy")
    from aerie import syncspec

    def reads_h5() -> None:
        raise ModuleNotFoundError("No module named 'h5py'", name="h5py")

    monkeypatch.setattr("syncspec.cli.main", reads_h5)
    with pytest.raises(SystemExit) as ended:
        syncspec()
    assert (ended.value.code, capsys.readouterr().err) == (2, said("h5py"))
