"""The learning curve of a run, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pygal

from drafter.train.history import Entry, write_whole


def write_curve(path: Path, entries: Sequence[Entry]) -> None:
    """Acceptance length on held-out examples, and the share of right drafts by unrolled step, over
    the answer tokens learnt from."""
    measured = [entry for entry in entries if entry.kind == "held out"]
    chart = pygal.XY(
        title="Held-out examples",
        x_title="answer tokens learnt from",
        show_dots=len(measured) < 50,
        range=(0, None),
        js=(),  # nothing that would be fetched from elsewhere
    )
    chart.add("acceptance length", [(e.num_answer_tokens, e.acceptance_length) for e in measured])
    for step in range(len(measured[0].accuracy) if measured else 0):
        points = [(e.num_answer_tokens, e.accuracy[step]) for e in measured]
        chart.add(f"draft {step + 1} right", points)
    rendered: bytes = chart.render()
    write_whole(path, rendered)
