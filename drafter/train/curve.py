"""The learning curve of a run, as SVG. Most plotting libraries would be the server's largest
dependency; the small one (pygal) changes Python's import system when it is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from drafter.train.history import Entry, write_whole

Point = tuple[float, float]
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 50, 170, 30, 45  # margins; line names are on the right
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


def write_curve(path: Path, entries: Sequence[Entry]) -> None:
    """Acceptance length on held-out examples, and the share of right drafts by unrolled step, over
    the answer tokens learnt from. Hovering over a point shows its values."""
    measured = [entry for entry in entries if entry.kind == "held out"]
    tokens = [float(entry.num_answer_tokens) for entry in measured]
    lines = {"acceptance length": [entry.acceptance_length for entry in measured]}
    for step in range(len(measured[0].accuracy) if measured else 0):
        lines[f"draft {step + 1} right"] = [entry.accuracy[step] for entry in measured]
    write_whole(path, ElementTree.tostring(_chart(tokens, lines), encoding="utf-8"))


def _chart(xs: Sequence[float], lines: dict[str, list[float]]) -> ElementTree.Element:
    box = f"0 0 {WIDTH} {HEIGHT}"
    svg = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=box)
    svg.set("font-family", "sans-serif")
    svg.set("font-size", "12")
    top = max((y for ys in lines.values() for y in ys), default=1.0) or 1.0
    far = max(xs, default=1.0) or 1.0
    _text(svg, LEFT, 18, "Held-out examples")
    _text(svg, LEFT, HEIGHT - 10, f"answer tokens learnt from, 0 to {far:.0f}")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = _place(0, share * top, far, top)
        _text(svg, 8, y + 4, f"{share * top:.2f}")
        _line(svg, [(x, y), (WIDTH - RIGHT, y)], "#dddddd")
    for number, (name, ys) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [_place(x, y, far, top) for x, y in zip(xs, ys, strict=True)]
        _line(svg, points, colour)
        for (px, py), x, y in zip(points, xs, ys, strict=True):
            dot = ElementTree.SubElement(svg, "circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r="2.5")
            dot.set("fill", colour)
            ElementTree.SubElement(dot, "title").text = f"{x:.0f}: {y:g}"
        _text(svg, WIDTH - RIGHT + 12, TOP + 20 + 18 * number, name, colour)
    return svg


def _place(x: float, y: float, far: float, top: float) -> Point:
    """The place of a value in the picture."""
    across = LEFT + x / far * (WIDTH - LEFT - RIGHT)
    return across, HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)


def _line(svg: ElementTree.Element, points: Sequence[Point], colour: str) -> None:
    at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    ElementTree.SubElement(svg, "polyline", points=at, fill="none", stroke=colour)


def _text(svg: ElementTree.Element, x: float, y: float, text: str, colour: str = "#000000") -> None:
    ElementTree.SubElement(svg, "text", x=f"{x:.1f}", y=f"{y:.1f}", fill=colour).text = text
