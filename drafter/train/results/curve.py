"""The learning curve of a run, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drafter.train.history import Entry, write_whole
from drafter.train.results.chart import LineChart


def write_curve(path: Path, entries: Sequence[Entry]) -> None:
    """Acceptance length on held-out examples, and the share of right drafts by unrolled step, over
    the answer tokens learnt from. Hovering over a point shows its values."""
    measured = [entry for entry in entries if entry.kind == "held out"]
    tokens = [float(entry.num_answer_tokens) for entry in measured]
    lines = {"acceptance length": [entry.acceptance_length for entry in measured]}
    sampled = [entry.sampled_acceptance_length for entry in measured]
    known = [length for length in sampled if length is not None]
    if len(known) == len(measured) > 0:  # logs of older runs have none
        lines["at temperature 1"] = known
    for step in range(len(measured[0].accuracy) if measured else 0):
        lines[f"draft {step + 1} right"] = [entry.accuracy[step] for entry in measured]
    caption = f"answer tokens learnt from, 0 to {max(tokens, default=1.0) or 1.0:.0f}"
    write_whole(path, LineChart("Held-out examples", caption, tokens, lines).svg())
