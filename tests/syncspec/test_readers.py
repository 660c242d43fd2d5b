"""Files of labelled shapes, point clouds and meshes; files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="syncspec needs scipy: pip install .[syncspec]")

import numpy as np

from syncspec.readers import FIRST_LABELS, SHAPENET, read_points, shapenet

MUG = FIRST_LABELS[11]
POINTS = np.random.default_rng(0).normal(size=(50, 3))


def text_layout(folder: Path, labels: np.ndarray) -> Path:
    rows = np.hstack([POINTS, np.zeros((50, 3)), labels[:, None]])
    (folder / "03797390").mkdir()
    (folder / "02691156").mkdir()
    np.savetxt(folder / "03797390" / "a1.txt", rows)
    lists = folder / "train_test_split"
    lists.mkdir()
    for split, shapes in {"train": ["03797390/a1", "02691156/x"], "val": [], "test": []}.items():
        named = json.dumps([f"shape_data/{shape}" for shape in shapes])
        (lists / f"shuffled_{split}_file_list.json").write_text(named)
    return folder


def test_labels_count_through_all_categories() -> None:
    assert FIRST_LABELS[-1] == 50
    assert (SHAPENET[11][0], MUG) == ("mug", 36)


def test_the_text_layout_is_read(tmp_path: Path) -> None:
    labels = MUG + np.arange(50) % 2
    data = shapenet(text_layout(tmp_path, labels), ("mug",))
    (shape,) = data.of("train", "mug")
    assert shape.labels.tolist() == (labels - MUG).tolist()
    assert np.abs(shape.points).max() == pytest.approx(1)
    assert data.categories["mug"].parts == ("part 0", "part 1")


def test_the_hdf5_layout_is_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="not installed")
    with h5py.File(tmp_path / "ply_data_train0.h5", "w") as file:
        file["data"] = np.stack([POINTS, POINTS + 1]).astype(np.float32)
        file["label"] = np.array([[11], [0]], dtype=np.uint8)
        file["pid"] = np.stack([np.full(50, MUG), np.arange(50) % 4])
    (tmp_path / "train_hdf5_file_list.txt").write_text("ply_data_train0.h5\n")
    data = shapenet(tmp_path, ("airplane", "mug"))
    assert data.of("train", "mug")[0].labels.tolist() == [0] * 50
    assert set(data.of("train", "airplane")[0].labels) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("label", "categories", "named"),
    [
        (0, ("mug",), r"a1.txt has labels \['0'\]; those of mug are 36 to 37"),
        (np.nan, ("mug",), r"a1.txt has labels \['nan'\]"),
        (36.5, ("mug",), r"a1.txt has labels \['36.5'\]"),
        (36, ("spoon",), r"\['spoon'\]; ShapeNet's parts have"),
        (36, ("cap",), "has no shapes for training"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    tmp_path: Path, label: float, categories: tuple[str, ...], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        shapenet(text_layout(tmp_path, np.full(50, label)), categories)


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.txt", "", "a.txt has no points"),
        ("a.xyz", "1 2 3\n4 5\n", "rows of equally many numbers"),
        ("a.pts", "1 2 three\n", "rows of equally many numbers"),
        ("a.txt", "1 2\n3 4\n", r"it must be \[N, 3\]"),
        ("a.txt", "1 2 3\n1 nan 3\n", "1 of 2 points are not finite"),
        (None, "", "is not a file"),
    ],
)
def test_files_without_points_are_refused(
    tmp_path: Path, name: str | None, text: str, named: str
) -> None:
    path = tmp_path / (name or "gone.ply")
    if name:
        path.write_text(text)
    with pytest.raises(ValueError, match=named):
        read_points(path, 100)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.txt", b"\x82\xff", "a.txt cannot be read as text"),
        ("a.npy", b"", "a.npy cannot be read as an array"),
        ("a.npy", b"\x82\xff", "a.npy cannot be read as an array"),
        ("a.ply", b"", "a.ply cannot be read as a mesh"),
        ("a.obj", b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "a.obj: 1 of 3 points are not finite"),
        ("a.what", b"1 2 3", "a.what cannot be read as a mesh"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, content: bytes, named: str) -> None:
    pytest.importorskip("trimesh", reason="not installed")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=named):
        read_points(tmp_path / name, 100)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"label": np.array([[16]])}, r"categories \[16\]; they must be 0 to 15"),
        ({"pid": np.zeros((1, 49))}, r"pid of shape \(1, 49\)"),
        ({"pid": None}, r"lacks \['pid'\]"),
        (None, "cannot be read as HDF5"),
    ],
)
def test_broken_hdf5_is_refused(
    tmp_path: Path, changed: dict[str, np.ndarray | None] | None, named: str
) -> None:
    h5py = pytest.importorskip("h5py", reason="not installed")
    (tmp_path / "train_hdf5_file_list.txt").write_text("data/a.h5\n")
    whole = {"data": POINTS[None], "label": np.array([[11]]), "pid": np.full((1, 50), MUG)}
    if changed is not None:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            for key, value in {**whole, **changed}.items():
                if value is not None:
                    file[key] = value
    with pytest.raises(ValueError, match=named):
        shapenet(tmp_path)


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("03797390/a1.txt", "a1.txt cannot be read as text"),
        ("train_test_split/shuffled_val_file_list.json", "shuffled_val_file_list.json must be"),
    ],
)
def test_text_that_is_missing_is_named(tmp_path: Path, file: str, named: str) -> None:
    text_layout(tmp_path, np.full(50, MUG))
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=named):
        shapenet(tmp_path, ("mug",))


def test_rows_and_arrays_are_points(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("0,1,2,9\n\n3,4,5,9\n")
    np.save(tmp_path / "a.npy", POINTS)
    assert read_points(tmp_path / "a.csv", 0).tolist() == [[0, 1, 2], [3, 4, 5]]
    np.testing.assert_array_equal(read_points(tmp_path / "a.npy", 0), POINTS)


def test_meshes_give_points_on_their_surface_and_clouds_their_own(tmp_path: Path) -> None:
    trimesh = pytest.importorskip("trimesh", reason="not installed")
    trimesh.creation.box((2, 2, 2)).export(tmp_path / "box.obj")
    points = read_points(tmp_path / "box.obj", 300)
    assert points.shape == (300, 3)
    np.testing.assert_allclose(np.abs(points).max(axis=1), 1, atol=1e-6)
    trimesh.PointCloud(POINTS).export(tmp_path / "cloud.ply")
    assert read_points(tmp_path / "cloud.ply", 7).shape == (50, 3)
    (tmp_path / "bad.ply").write_text("nothing")
    with pytest.raises(ValueError, match=r"bad.ply"):
        read_points(tmp_path / "bad.ply", 7)
