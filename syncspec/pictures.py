"""Coloured points, as PLY files and as pictures, and plots of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from syncspec.shapes import Floats, Ints
from syncspec.training import Course

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that people with colour blindness tell apart (Okabe and Ito), then two more.
COLOURS = np.array(
    [
        [0, 114, 178],
        [230, 159, 0],
        [0, 158, 115],
        [204, 121, 167],
        [86, 180, 233],
        [213, 94, 0],
        [240, 228, 66],
        [90, 90, 90],
    ]
)


def colours_of(labels: Ints) -> Ints:
    """Red, green and blue, 0 to 255, of every label. [N] -> [N, 3]"""
    return COLOURS[labels % len(COLOURS)]


def write_ply(path: Path, points: Floats, labels: Ints, names: Sequence[str]) -> None:
    """Points with colours and labels, as text; comments tell the name of each label."""
    properties = [f"property float {axis}" for axis in "xyz"]
    properties += [f"property uchar {name}" for name in ("red", "green", "blue")]
    header = ["ply", "format ascii 1.0"]
    header += [f"comment label {number} {name}" for number, name in enumerate(names)]
    header += [f"element vertex {len(points)}", *properties]
    header += ["property int label", "end_header"]
    rows = [
        f"{x:.6g} {y:.6g} {z:.6g} {r} {g} {b} {label}"
        for (x, y, z), (r, g, b), label in zip(points, colours_of(labels), labels, strict=True)
    ]
    path.write_text("\n".join([*header, *rows, ""]), encoding="ascii")


def draw_shapes(
    path: Path,
    shapes: Sequence[tuple[str, Floats, Ints]],
    columns: int,
    names: Sequence[str] = (),
) -> None:
    """A picture of points in the colours of their labels; each shape has a title.

    `names` of labels make a legend.
    """
    figure = _figure(3 * columns, 3 * -(-len(shapes) // columns))
    for number, (title, points, labels) in enumerate(shapes):
        axes: Any = figure.add_subplot(
            -(-len(shapes) // columns), columns, number + 1, projection="3d"
        )
        axes.scatter(*points[:, [0, 2, 1]].T, c=colours_of(labels) / 255, s=2, depthshade=False)
        axes.set_title(title, fontsize=9)
        axes.set_box_aspect(np.ptp(points[:, [0, 2, 1]], axis=0) + 1e-9)
        axes.set_axis_off()
        axes.view_init(elev=20, azim=-60)
    if names:
        _legend(figure, names)
    figure.savefig(path, dpi=80)


def _legend(figure: Figure, names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    colours = colours_of(np.arange(len(names))) / 255
    patches = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def draw_courses(path: Path, courses: Mapping[str, Course]) -> None:
    """The losses of every epoch, a line for each model: of labels, and of maps if there are."""
    losses = {
        "loss of functional maps": {n: c.maps for n, c in courses.items() if c.maps},
        "loss of labels": {n: c.labels for n, c in courses.items()},
    }
    drawn = {title: lines for title, lines in losses.items() if lines}
    figure = _figure(5 * len(drawn), 3.5)
    for number, (title, lines) in enumerate(drawn.items()):
        axes = figure.add_subplot(1, len(drawn), number + 1)
        for name, values in lines.items():
            axes.plot(range(1, len(values) + 1), values, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def draw_pck(path: Path, curves: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """The share of keypoints found against the distance: axes by split, a line for each network."""
    figure = _figure(4.5 * len(curves), 3.5)
    for number, (split, networks) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), number + 1)
        for name, shares in networks.items():
            axes.plot([float(distance) for distance in shares], list(shares.values()), label=name)
        axes.set_title(f"{split} geometry", fontsize=9)
        axes.set_xlabel("distance (the longest half side is 1)")
        axes.set_ylabel("keypoints found")
        axes.set_ylim(0, 1)
        if networks:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def _figure(width: float, height: float) -> Figure:
    """A figure without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
