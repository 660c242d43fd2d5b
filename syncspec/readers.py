"""Shapes from files: ShapeNet's part annotations in two layouts, point clouds and meshes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from syncspec.shapes import Category, Dataset, Floats, Shape, checked_points, normalised

# Category, its folder, and its number of parts. The labels 0 to 49 of both layouts count through
# the parts of all categories in this order.
SHAPENET = (
    ("airplane", "02691156", 4),
    ("bag", "02773838", 2),
    ("cap", "02954340", 2),
    ("car", "02958343", 4),
    ("chair", "03001627", 4),
    ("earphone", "03261776", 3),
    ("guitar", "03467517", 3),
    ("knife", "03624134", 2),
    ("lamp", "03636649", 4),
    ("laptop", "03642806", 2),
    ("motorbike", "03790512", 6),
    ("mug", "03797390", 2),
    ("pistol", "03948459", 3),
    ("rocket", "04099429", 3),
    ("skateboard", "04225987", 3),
    ("table", "04379243", 3),
)
FIRST_LABELS = np.cumsum([0, *(count for _, _, count in SHAPENET)])
SPLITS = ("train", "val", "test")
TEXT_ENDINGS = (".txt", ".xyz", ".pts", ".csv")


def shapenet(folder: Path, categories: tuple[str, ...] = ()) -> Dataset:
    """ShapeNet's part annotations, all or some of the categories.

    The text layout has a folder for each category, with a file of rows `x y z nx ny nz label` for
    each shape, and lists in train_test_split/. The HDF5 layout has train_hdf5_file_list.txt, and
    files with data [S, N, 3], label [S, 1] and pid [S, N].

    Raises:
        ValueError: neither layout, an unknown category, or a file that does not keep to its layout.
    """
    known = [name for name, _, _ in SHAPENET]
    if not set(categories) <= set(known):
        raise ValueError(f"categories are {list(categories)}; ShapeNet's parts have {known}")
    chosen = categories or tuple(known)
    read = _split_of_text if (folder / "train_test_split").is_dir() else _split_of_hdf5
    splits = {split: tuple(read(folder, split, chosen)) for split in SPLITS}
    kinds = {name: _category(name, count) for name, _, count in SHAPENET if name in chosen}
    if not splits["train"]:
        raise ValueError(
            f"{folder} has no shapes for training; it must hold train_test_split/ and folders such "
            "as 02691156/, or train_hdf5_file_list.txt"
        )
    return Dataset(kinds, splits)


def _category(name: str, num_parts: int) -> Category:
    return Category(name, tuple(f"part {number}" for number in range(num_parts)))


def _split_of_text(folder: Path, split: str, categories: tuple[str, ...]) -> Iterator[Shape]:
    path = folder / "train_test_split" / f"shuffled_{split}_file_list.json"
    names = {synset: name for name, synset, _ in SHAPENET}
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a list of shapes as JSON: {error}") from error
    for line in listed:
        synset, shape = str(line).split("/")[-2:]
        if names.get(synset) in categories:
            yield labelled_text(folder / synset / f"{shape}.txt", names[synset])


def labelled_text(path: Path, category: str) -> Shape:
    """A file of rows `x y z [...] label`. Labels count through all categories of ShapeNet."""
    rows = _rows(path)
    if rows.shape[1] < 4:
        raise ValueError(f"{path} has rows of {rows.shape[1]} numbers; it must be x y z ... label")
    return _shape(rows[:, :3], rows[:, -1], category, str(path))


def _split_of_hdf5(folder: Path, split: str, categories: tuple[str, ...]) -> Iterator[Shape]:
    listed = folder / f"{split}_hdf5_file_list.txt"
    files = listed.read_text(encoding="utf-8").split() if listed.exists() else []
    for file in files:
        yield from _shapes_of_hdf5(folder / Path(file).name, categories)


def _shapes_of_hdf5(path: Path, categories: tuple[str, ...]) -> Iterator[Shape]:
    import h5py

    try:
        with h5py.File(path) as file:
            missing = sorted({"data", "label", "pid"} - set(file))
            if missing:
                raise ValueError(f"{path} lacks {missing}; it has {sorted(file)}")
            data, kinds, parts = file["data"][:], file["label"][:].ravel(), file["pid"][:]
    except OSError as error:
        raise ValueError(f"{path} cannot be read as HDF5: {error}") from error
    if data.shape[:2] != parts.shape or len(kinds) != len(data):
        raise ValueError(
            f"{path} has data of shape {data.shape}, label of {len(kinds)} and pid of shape "
            f"{parts.shape}; they must be [S, N, 3], [S, 1] and [S, N]"
        )
    if not set(kinds.tolist()) <= set(range(len(SHAPENET))):
        raise ValueError(
            f"{path} has categories {sorted(set(kinds.tolist()))}; they must be 0 to "
            f"{len(SHAPENET) - 1}"
        )
    for number, kind in enumerate(kinds):
        category = SHAPENET[int(kind)][0]
        if category in categories:
            yield _shape(data[number], parts[number], category, f"{path} shape {number}")


def _shape(points: Floats, labels: Floats, category: str, source: str) -> Shape:
    """Checked and normalised, with labels that begin at 0."""
    number = [name for name, _, _ in SHAPENET].index(category)
    allowed = np.arange(FIRST_LABELS[number], FIRST_LABELS[number + 1])
    if not np.isin(labels, allowed).all():
        raise ValueError(
            f"{source} has labels {[f'{label:g}' for label in np.unique(labels)]}; those of "
            f"{category} are {allowed[0]} to {allowed[-1]}"
        )
    own = labels.astype(np.int64) - FIRST_LABELS[number]
    return normalised(
        Shape(category, checked_points(points, source), own, np.empty((0, 3)), source)
    )


def read_points(path: Path, num_points: int, seed: int = 0) -> Floats:
    """The points of a file, for one without labels. [N, 3]

    Text files and .npy hold a point a row, in their first three columns; every other ending goes
    through trimesh: the points of a cloud, or `num_points` random ones on the surface of a mesh.

    Raises:
        ValueError: no such file, or one that cannot be read or has no points.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.suffix.lower() in TEXT_ENDINGS:
        return checked_points(_rows(path)[:, :3], str(path))
    if path.suffix.lower() == ".npy":
        return checked_points(_from_numpy(path), str(path))
    return checked_points(_from_trimesh(path, num_points, seed), str(path))


def _from_numpy(path: Path) -> Floats:
    try:
        array = np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an array of numbers: {error}") from error
    return array[:, :3] if array.ndim == 2 else array


def _rows(path: Path) -> Floats:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no points")
    try:
        rows = [[float(word) for word in line.replace(",", " ").split()] for line in lines]
        return np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path} must have rows of equally many numbers: {error}") from error


def _from_trimesh(path: Path, num_points: int, seed: int) -> Floats:
    import trimesh

    try:
        scene = trimesh.load_scene(path, process=False)  # else it drops what is not finite
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as a mesh or a point cloud: {error}") from error
    meshes = [m for m in scene.dump() if isinstance(m, trimesh.Trimesh) and len(m.faces)]
    if meshes:
        whole = trimesh.util.concatenate(meshes)
        checked_points(whole.vertices, str(path))
        points, _ = trimesh.sample.sample_surface(whole, num_points, seed=seed)
        return np.asarray(points)
    clouds = [np.asarray(each.vertices) for each in scene.dump() if hasattr(each, "vertices")]
    return np.concatenate(clouds) if clouds else np.empty((0, 3))
