"""The learning curve is a self-contained SVG."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from drafter.train.history import Entry
from drafter.train.results.curve import write_curve


def measured(step: int, kind: str = "held out") -> Entry:
    return Entry(kind, step, 1000 * step, 1.0, 3.0, [0.1 * step, 0.05], 1 + step / 4, 0.0, 0.0)


@pytest.mark.parametrize("num_points", [0, 1, 3, 60])
def test_it_is_valid_and_fetches_nothing(num_points: int, tmp_path: Path) -> None:
    path = tmp_path / "curve.svg"
    write_curve(path, [measured(step) for step in range(num_points)])
    tree = ElementTree.parse(path).getroot()
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    for element in tree.iter():
        assert [name for name in element.attrib if name.split("}")[-1] in ("href", "src")] == []
    assert re.findall(r"@import|url\(\s*['\"]?https?:|<script[^>]+src", path.read_text()) == []
    assert [file.name for file in tmp_path.iterdir()] == ["curve.svg"]


def test_it_shows_what_was_measured_and_nothing_of_training(tmp_path: Path) -> None:
    entries = [measured(0), measured(7, "train"), measured(2)]
    write_curve(tmp_path / "curve.svg", entries)
    texts = "".join(ElementTree.parse(tmp_path / "curve.svg").getroot().itertext())
    assert all(name in texts for name in ("acceptance length", "draft 1 right", "draft 2 right"))
    assert "2000: 1.5" in texts
    assert "7000" not in texts
    assert "temperature" not in texts


def test_it_shows_acceptance_at_temperature_1_if_all_of_it_is_known(tmp_path: Path) -> None:
    entries = [replace(measured(step), sampled_acceptance_length=1.125) for step in (0, 2)]
    write_curve(tmp_path / "curve.svg", entries)
    assert "at temperature 1" in (tmp_path / "curve.svg").read_text()
    write_curve(tmp_path / "curve.svg", [measured(0), *entries])
    assert "at temperature 1" not in (tmp_path / "curve.svg").read_text()
