"""Labelled shapes made from parameters: furniture, lamps, mugs and airplanes.

Every shape of a category has all of its parts and keypoints. A parameter is drawn from the middle
of its range for "seen" geometry, and from both ends of it for "unseen" geometry, so that a test on
unseen geometry asks for proportions that training never showed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from syncspec.shapes import Category, Dataset, Shape, normalised
from syncspec.surfaces import Arc, Ellipsoid, Slab, Surface, Tube, Vector, box

Pieces = list[tuple[str, Surface]]
Built = tuple[Pieces, dict[str, Vector]]
MIDDLE = (0.2, 0.8)  # of every range: seen geometry; the rest of it is unseen geometry
LEAST_SHARE = 0.03  # of the points, for every surface: thin ones stay connected


@dataclass(frozen=True)
class Draw:
    """Draws parameters for seen or for unseen geometry."""

    rng: np.random.Generator
    unseen: bool = False

    def between(self, low: float, high: float) -> float:
        """A number of the range."""
        inner, outer = MIDDLE
        u = inner + (outer - inner) * self.rng.random()
        if self.unseen:
            u = self.rng.random() * inner
            u = u if self.rng.random() < 0.5 else 1 - u
        return low + (high - low) * u

    def either(self) -> bool:
        """One of two structures; both are in training."""
        return bool(self.rng.random() < 0.5)


def generate(category: str, num_points: int, seed: int, *, unseen: bool = False) -> Shape:
    """One shape of `num_points` points, the same for the same arguments.

    Density varies from surface to surface by up to a factor of 4.

    Raises:
        ValueError: an unknown category, or fewer than 100 points.
    """
    if category not in MAKERS:
        raise ValueError(f"category {category!r} is unknown; there are {sorted(MAKERS)}")
    if num_points < 100:
        raise ValueError(f"num_points is {num_points}; it must be at least 100")
    rng = np.random.default_rng([seed, sorted(MAKERS).index(category), int(unseen)])
    pieces, keypoints = MAKERS[category](Draw(rng, unseen))
    kind = CATEGORIES[category]
    counts = _counts([surface.area for _, surface in pieces], num_points, rng)
    points = [s.sample(n, rng) for (_, s), n in zip(pieces, counts, strict=True)]
    labels = np.repeat([kind.parts.index(part) for part, _ in pieces], counts)
    places = np.array([keypoints[name] for name in kind.keypoints])
    shape = Shape(category, np.concatenate(points), labels, places, f"{category}-{seed}")
    return normalised(shape)


def generated_set(
    num_train: int, num_test: int, num_points: int, seed: int, categories: tuple[str, ...] = ()
) -> Dataset:
    """Splits "train" and "seen" (the same ranges of parameters), and "unseen", by category."""
    chosen = categories or tuple(CATEGORIES)
    first = seed * 100_000

    def many(start: int, count: int, unseen: bool) -> Iterator[Shape]:
        for category in chosen:
            for number in range(start, start + count):
                yield generate(category, num_points, first + number, unseen=unseen)

    splits = {
        "train": tuple(many(0, num_train, False)),
        "seen": tuple(many(num_train, num_test, False)),
        "unseen": tuple(many(0, num_test, True)),
    }
    return Dataset({name: CATEGORIES[name] for name in chosen if name in CATEGORIES}, splits)


def _counts(areas: list[float], num_points: int, rng: np.random.Generator) -> list[int]:
    """Points for every surface: by area, with random density, none without its least share."""
    weights = np.array(areas) * np.exp(rng.uniform(-np.log(2), np.log(2), len(areas)))
    least = min(LEAST_SHARE, 0.5 / len(areas))
    share = least + (1 - least * len(areas)) * weights / weights.sum()
    ends = np.rint(np.cumsum(share) * num_points).astype(int)
    return [int(count) for count in np.diff(ends, prepend=0)]


def _legs(draw: Draw, width: float, depth: float, height: float) -> list[Surface]:
    """Four legs at the corners, or one column on a foot, between the floor and `height`."""
    thick = draw.between(0.05, 0.14)
    if draw.either():
        foot = min(width, depth) * draw.between(0.3, 0.5)
        column = Tube((0, thick, 0), (0, height, 0), (thick, thick))
        return [column, Tube((0, 0, 0), (0, thick, 0), (foot, foot))]
    x, z = (width - thick) / 2, (depth - thick) / 2
    splay = draw.between(0.0, 0.15)
    half = thick / 2
    return [
        Tube((a * (x + splay), 0, b * (z + splay)), (a * x, height, b * z), (half, half))
        for a in (-1, 1)
        for b in (-1, 1)
    ]


def chair(draw: Draw) -> Built:
    """A seat on legs, with a back of one plate or of bars, and two arms."""
    width, depth = draw.between(0.6, 1.4), draw.between(0.6, 1.3)
    height, thick = draw.between(0.3, 1.3), draw.between(0.06, 0.2)
    rise, lean = draw.between(0.4, 1.6), draw.between(0.0, 0.35)
    top, front, rear = height + thick, depth / 2, -depth / 2
    arm = draw.between(0.18, 0.5) * min(rise, 1.0)
    pieces: Pieces = [("leg", leg) for leg in _legs(draw, width, depth, height)]
    pieces.append(("seat", box((0, height + thick / 2, 0), (width, thick, depth))))
    bars = int(draw.between(2.5, 5.5)) if draw.either() else 1
    share = 0.5 if bars > 1 else 1.0
    for x in (np.arange(bars) + 0.5) * width / bars - width / 2:
        half = width / bars * share / 2
        a, b = float(x - half), float(x + half)
        base, peak = (top, rear), (top + rise, rear - lean)
        corners = ((a, *base), (b, *base), (b, *peak), (a, *peak))
        pieces.append(("back", Slab(corners, (0, 0, 0.08))))
    for side in (-1, 1):
        x = side * (width / 2 - 0.04)
        pieces.append(("arm", box((x, top + arm, 0), (0.08, 0.06, depth))))
        pieces.append(("arm", box((x, top + arm / 2, front - 0.05), (0.06, arm, 0.06))))
    names = [f"seat {a} {b}" for a in ("left", "right") for b in ("rear", "front")]
    places = [(a * width / 2, top, b) for a in (-1, 1) for b in (rear, front)]
    ends = {f"back {n}": (a * width / 2, top + rise, rear - lean) for n, a in SIDES}
    return pieces, dict(zip(names, places, strict=True)) | ends


def table(draw: Draw) -> Built:
    """A rectangular or round top on legs, with a shelf beneath."""
    width, depth = draw.between(0.8, 2.4), draw.between(0.6, 1.4)
    height, thick = draw.between(0.4, 1.4), draw.between(0.04, 0.16)
    pieces: Pieces = [("leg", leg) for leg in _legs(draw, width * 0.8, depth * 0.8, height)]
    if draw.either():
        width = depth = (width + depth) / 2
        edge = (0.0, height, 0.0), (0.0, height + thick, 0.0)
        pieces.append(("top", Tube(*edge, (width / 2, width / 2))))
    else:
        pieces.append(("top", box((0, height + thick / 2, 0), (width, thick, depth))))
    level = height * draw.between(0.15, 0.65)
    pieces.append(("shelf", box((0, level, 0), (width * 0.8, 0.05, depth * 0.8))))
    up = height + thick
    ends = {f"{name} end": (a * width / 2, up, 0.0) for name, a in SIDES}
    return pieces, ends | {"front": (0.0, up, depth / 2), "rear": (0.0, up, -depth / 2)}


def lamp(draw: Draw) -> Built:
    """A foot, a pole, straight or bent, and a shade."""
    foot, flat = draw.between(0.2, 0.7), draw.between(0.04, 0.25)
    height, thick = draw.between(0.4, 2.2), draw.between(0.03, 0.1)
    low, high = draw.between(0.3, 0.9), draw.between(0.12, 0.5)
    tall, drop = draw.between(0.25, 0.9), draw.between(0.0, 0.25)
    bend = draw.between(0.2, 0.6) if draw.either() else 0.0
    top = flat + height
    under = top - drop * tall
    # The pole carries the closed top of the shade.
    pole = Tube((0, flat, 0), (bend, under + tall, 0), (thick, thick))
    pieces: Pieces = [("pole", pole)]
    if draw.either():
        pieces.append(("base", Tube((0, 0, 0), (0, flat, 0), (foot, foot * draw.between(0.5, 1)))))
    else:
        pieces.append(("base", box((0, flat / 2, 0), (2 * foot, flat, 2 * foot))))
    cone = Tube((bend, under, 0), (bend, under + tall, 0), (low, high), (False, True))
    pieces.append(("shade", cone))
    rims = {f"shade {name}": (bend + a * low, under, 0.0) for name, a in SIDES}
    ends = {"pole foot": (0.0, flat, 0.0), "shade top": (bend, under + tall, 0.0)}
    return pieces, rims | ends


def mug(draw: Draw) -> Built:
    """A cup that is open at the top, with a round or angular handle at +x."""
    low, high = draw.between(0.3, 0.7), draw.between(0.35, 0.8)
    height, thick = draw.between(0.5, 1.9), draw.between(0.03, 0.09)
    middle, half = height * draw.between(0.35, 0.65), height * draw.between(0.15, 0.33)
    reach = draw.between(0.2, 0.6)
    cup = Tube((0, 0, 0), (0, height, 0), (low, high), (True, False))

    def wall(y: float) -> float:
        return low + (high - low) * y / height

    ends = (wall(middle + half), middle + half), (wall(middle - half), middle - half)
    pieces: Pieces = [("body", cup)]
    x = wall(middle)
    if draw.either():
        angles = (-np.pi / 2, np.pi / 2)
        pieces.append(("handle", Arc((x, middle, 0), (reach, half), thick, angles)))
    else:
        far = x + reach
        pieces += [
            ("handle", Tube((a, y, 0), (far, y, 0), (thick, thick), (False, False)))
            for a, y in ends
        ]
        upright = Tube((far, middle - half, 0), (far, middle + half, 0), (thick, thick))
        pieces.append(("handle", upright))
    joints = zip(("upper", "lower"), ends, strict=True)
    places = {f"handle {name}": (a, y, 0.0) for name, (a, y) in joints}
    outer = {"handle outside": (x + reach + thick, middle, 0.0)}
    return pieces, places | outer | {"rim": (-high, height, 0.0), "bottom": (0.0, 0.0, 0.0)}


def airplane(draw: Draw) -> Built:
    """A fuselage along z, swept wings, a tail with a fin, and an engine under each wing."""
    length, girth = draw.between(0.8, 1.4), draw.between(0.08, 0.24)
    span, chord = draw.between(0.5, 1.6), draw.between(0.18, 0.5)
    sweep, lift = draw.between(0.0, 0.6), draw.between(-0.1, 0.25)
    fin, tail = draw.between(0.2, 0.6), draw.between(0.25, 0.6)
    place = draw.between(-0.2, 0.3) * length
    pieces: Pieces = [("fuselage", Ellipsoid((0, 0, 0), (girth, girth, length)))]
    back = -length * 0.9
    for _, side in SIDES:
        wing = _wing(side, (girth * 0.7, 0, place), (span, lift, -sweep), chord)
        small = _wing(side, (0, 0, back + 0.2), (tail, 0.05, -sweep / 3), chord * 0.5)
        pieces += [("wing", wing), ("tail", small)]
        x, radius = girth * 0.7 + span * 0.4, draw.between(0.05, 0.11)
        y, z = lift * 0.4 - radius, place - sweep * 0.4
        nacelle = Tube((side * x, y, z - 0.16), (side * x, y, z + 0.16), (radius * 0.8, radius))
        pieces.append(("engine", nacelle))
    upright = ((0, 0, back + 0.3), (0, 0, back), (0, fin, back - 0.1), (0, fin, back + 0.1))
    pieces.append(("tail", Slab(upright, (0.03, 0, 0))))
    tips = {
        f"{name} wing tip": (a * (girth * 0.7 + span), lift, place - sweep) for name, a in SIDES
    }
    nose: dict[str, Vector] = {"nose": (0.0, 0.0, length), "fin top": (0.0, fin, back)}
    return pieces, tips | nose


def _wing(side: int, root: Vector, reach: Vector, chord: float) -> Slab:
    """A trapezium from the root to the tip, whose chord is half as long."""
    (x, y, z), (dx, dy, dz) = root, reach
    tip = (side * (x + dx), y + dy, z + dz)
    corners = (
        (side * x, y, z + chord / 2),
        (side * x, y, z - chord / 2),
        (tip[0], tip[1], tip[2] - chord / 4),
        (tip[0], tip[1], tip[2] + chord / 4),
    )
    return Slab(corners, (0, 0.03, 0))


SIDES = (("left", -1), ("right", 1))
MAKERS: Mapping[str, Callable[[Draw], Built]] = {
    "airplane": airplane,
    "chair": chair,
    "lamp": lamp,
    "mug": mug,
    "table": table,
}


def _category(name: str) -> Category:
    pieces, keypoints = MAKERS[name](Draw(np.random.default_rng(0)))
    return Category(name, tuple(sorted({part for part, _ in pieces})), tuple(keypoints))


CATEGORIES: Mapping[str, Category] = {name: _category(name) for name in MAKERS}
