"""Surfaces that shapes are put together from: each gives random points on itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from syncspec.shapes import Floats

Vector = tuple[float, float, float]


class Surface(Protocol):
    """Points are drawn evenly, or nearly so, by area."""

    @property
    def area(self) -> float: ...

    def sample(self, count: int, rng: np.random.Generator) -> Floats:
        """Random points on the surface. [count, 3]"""
        ...


@dataclass(frozen=True)
class Slab:
    """A plate between two parallel outlines: 4 corners in order, and a thickness along y or x.

    A box is a slab with a rectangle; a wing is one with a trapezium.
    """

    corners: tuple[Vector, Vector, Vector, Vector]
    thickness: Vector  # from the first face to the second

    @property
    def area(self) -> float:
        return float(self._areas().sum())

    def sample(self, count: int, rng: np.random.Generator) -> Floats:
        faces = self._faces()
        chance = self._areas() / self.area
        chosen = rng.choice(len(faces), count, p=chance)
        u, v = rng.random((2, count, 1))
        a, b, c, d = (faces[chosen, corner] for corner in range(4))
        found: Floats = (a * (1 - u) + b * u) * (1 - v) + (d * (1 - u) + c * u) * v
        return found

    def _faces(self) -> Floats:
        """The two plates and the four sides. [6, 4, 3]"""
        first = np.array(self.corners)
        second = first + np.array(self.thickness)
        after = np.roll(np.arange(4), -1)
        sides = [[first[i], first[j], second[j], second[i]] for i, j in enumerate(after)]
        return np.array([first, second, *sides])

    def _areas(self) -> Floats:
        faces = self._faces()
        diagonals = np.cross(faces[:, 2] - faces[:, 0], faces[:, 3] - faces[:, 1])
        found: Floats = np.linalg.norm(diagonals, axis=1) / 2
        return found


def box(centre: Vector, size: Vector) -> Slab:
    """A box along the axes."""
    x, y, z = centre
    half_x, half_z = size[0] / 2, size[2] / 2
    low = y - size[1] / 2
    corners = (
        (x - half_x, low, z - half_z),
        (x + half_x, low, z - half_z),
        (x + half_x, low, z + half_z),
        (x - half_x, low, z + half_z),
    )
    return Slab(corners, (0.0, size[1], 0.0))


@dataclass(frozen=True)
class Tube:
    """The side of a cone between two circles, and the discs of those ends that are closed."""

    start: Vector
    end: Vector
    radii: tuple[float, float]
    closed: tuple[bool, bool] = (True, True)

    @property
    def area(self) -> float:
        return float(self._areas().sum())

    def sample(self, count: int, rng: np.random.Generator) -> Floats:
        piece = rng.choice(3, count, p=self._areas() / self.area)
        along = np.where(piece == 0, self._along(rng.random(count)), piece - 1.0)
        radius = self.radii[0] * (1 - along) + self.radii[1] * along
        radius = np.where(piece == 0, radius, radius * np.sqrt(rng.random(count)))
        return self._at(along, radius, rng.random(count) * 2 * np.pi)

    def _at(self, along: Floats, radius: Floats, angle: Floats) -> Floats:
        start, axis = np.array(self.start), np.subtract(self.end, self.start)
        first, second = _across(axis)
        ring = np.cos(angle)[:, None] * first + np.sin(angle)[:, None] * second
        return start + along[:, None] * axis + radius[:, None] * ring

    def _along(self, u: Floats) -> Floats:
        """Where on the axis, so that a cone has as many points per area at both ends."""
        first, last = self.radii
        if abs(last - first) < 1e-9:
            return u
        return (np.sqrt(first**2 + u * (last**2 - first**2)) - first) / (last - first)

    def _areas(self) -> Floats:
        """Of the side, of the first disc and of the second."""
        length = float(np.linalg.norm(np.subtract(self.end, self.start)))
        first, last = self.radii
        side = np.pi * (first + last) * np.hypot(length, last - first)
        discs = [np.pi * r**2 * shut for r, shut in zip(self.radii, self.closed, strict=True)]
        return np.array([side, *discs])


@dataclass(frozen=True)
class Arc:
    """A bent tube in the x-y plane: part of an ellipse, from one angle to another."""

    centre: Vector
    half_axes: tuple[float, float]
    radius: float
    angles: tuple[float, float]  # radians, from +x towards +y

    @property
    def area(self) -> float:
        mean = sum(self.half_axes) / 2
        return float(2 * np.pi * self.radius * mean * abs(self.angles[1] - self.angles[0]))

    def sample(self, count: int, rng: np.random.Generator) -> Floats:
        low, high = self.angles
        turn = (low + (high - low) * rng.random(count))[:, None]
        around = (2 * np.pi * rng.random(count))[:, None]
        outwards = np.hstack([np.cos(turn), np.sin(turn), np.zeros_like(turn)])
        middle = outwards * [*self.half_axes, 0.0] + np.array(self.centre)
        ring = np.cos(around) * outwards + np.sin(around) * np.array([0.0, 0.0, 1.0])
        found: Floats = middle + self.radius * ring
        return found


@dataclass(frozen=True)
class Ellipsoid:
    """Points are a sphere's, stretched: a little denser at the ends of a long one."""

    centre: Vector
    half_axes: Vector

    @property
    def area(self) -> float:
        a, b, c = (axis**1.6 for axis in self.half_axes)
        return float(4 * np.pi * ((a * b + a * c + b * c) / 3) ** (1 / 1.6))  # Thomsen's formula

    def sample(self, count: int, rng: np.random.Generator) -> Floats:
        directions = rng.normal(size=(count, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        found: Floats = np.array(self.centre) + directions * np.array(self.half_axes)
        return found


def _across(axis: Floats) -> tuple[Floats, Floats]:
    """Two unit vectors at right angles to the axis and to each other."""
    unit = axis / np.linalg.norm(axis)
    helper = np.eye(3)[np.argmin(np.abs(unit))]
    first = np.cross(unit, helper)
    first /= np.linalg.norm(first)
    return first, np.cross(unit, first)
