"""Charts of lines as SVG. Most plotting libraries would be the server's largest dependency; the
small one (pygal) changes Python's import system when it is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

Point = tuple[float, float]
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 50, 170, 30, 45  # margins; line names are on the right
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


@dataclass(frozen=True, slots=True)
class LineChart:
    """Lines over common places on the x axis. Hovering over a point shows its values."""

    title: str
    caption: str  # of the x axis
    xs: Sequence[float]
    lines: Mapping[str, Sequence[float]]
    names: Sequence[str] | None = None  # of the places, written below them; default: their numbers

    def svg(self) -> bytes:
        drawn: bytes = ElementTree.tostring(self._drawn(), encoding="utf-8")
        return drawn

    def _drawn(self) -> ElementTree.Element:
        box = f"0 0 {WIDTH} {HEIGHT}"
        svg = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=box)
        svg.set("font-family", "sans-serif")
        svg.set("font-size", "12")
        far = max(self.xs, default=1.0) or 1.0
        top = max((y for ys in self.lines.values() for y in ys), default=1.0) or 1.0
        _text(svg, LEFT, 18, self.title)
        _text(svg, LEFT, HEIGHT - 10, self.caption)
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            x, y = _place(0, share * top, far, top)
            _text(svg, 8, y + 4, f"{share * top:.2f}")
            _line(svg, [(x, y), (WIDTH - RIGHT, y)], "#dddddd")
        for x, name in zip(self.xs if self.names else (), self.names or (), strict=True):
            _text(svg, _place(x, 0, far, top)[0], HEIGHT - BOTTOM + 15, name)
        for number, name in enumerate(self.lines):
            self._draw(svg, number, name, (far, top))
        return svg

    def _draw(self, svg: ElementTree.Element, number: int, name: str, ends: Point) -> None:
        colour, ys = COLOURS[number % len(COLOURS)], self.lines[name]
        points = [_place(x, y, *ends) for x, y in zip(self.xs, ys, strict=True)]
        _line(svg, points, colour)
        names = self.names or [f"{x:.0f}" for x in self.xs]
        for (px, py), at, y in zip(points, names, ys, strict=True):
            dot = ElementTree.SubElement(svg, "circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r="2.5")
            dot.set("fill", colour)
            ElementTree.SubElement(dot, "title").text = f"{at}: {y:g}"
        _text(svg, WIDTH - RIGHT + 12, TOP + 20 + 18 * number, name, colour)


def _place(x: float, y: float, far: float, top: float) -> Point:
    """The place of a value in the picture."""
    across = LEFT + x / far * (WIDTH - LEFT - RIGHT)
    return across, HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)


def _line(svg: ElementTree.Element, points: Sequence[Point], colour: str) -> None:
    at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    ElementTree.SubElement(svg, "polyline", points=at, fill="none", stroke=colour)


def _text(svg: ElementTree.Element, x: float, y: float, text: str, colour: str = "#000000") -> None:
    ElementTree.SubElement(svg, "text", x=f"{x:.1f}", y=f"{y:.1f}", fill=colour).text = text
