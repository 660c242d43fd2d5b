"""The command `syncspec`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors import SafetensorError

from syncspec import checkpoint
from syncspec.comparison import TEST_SPLITS, VARIANTS, Comparison, Sizes, compare
from syncspec.evaluation import evaluate as evaluate_models
from syncspec.generator import generated_set
from syncspec.graph import REFERENCE_POINTS, WEIGHTS, BasisCache
from syncspec.network import PAPER, Design
from syncspec.pictures import draw_courses, draw_pck, draw_shapes, write_ply
from syncspec.preparing import Prepared, prepare
from syncspec.readers import read_points, shapenet
from syncspec.segmentation import find_keypoints
from syncspec.segmentation import segment as segment_points
from syncspec.shapes import Dataset, resampled
from syncspec.tables import mean_pck, table
from syncspec.training import PAPER_SCHEDULE, Course, Model, Progress, Schedule
from syncspec.training import train as train_model

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Parts and keypoints of 3D shapes."
)
CACHE = Path.home() / ".cache" / "syncspec"


class Task(StrEnum):
    parts = "parts"
    keypoints = "keypoints"


class Preset(StrEnum):
    small = "small"
    paper = "paper"


PRESETS = {
    Preset.small: (Design(), Schedule()),
    Preset.paper: (PAPER, PAPER_SCHEDULE),
}
DataOption = Annotated[
    str, typer.Option(help="`generated`, or the folder of ShapeNet's part annotations.")
]
CategoryOption = Annotated[
    list[str] | None, typer.Option("--category", help="Only this; may be repeated.")
]
CacheOption = Annotated[Path, typer.Option(help="Where eigenpairs are kept.")]
ModelsOption = Annotated[Path, typer.Option(help="The folder of trained models.")]
DeviceOption = Annotated[str, typer.Option(help="`cpu`, `cuda` or `cuda:N`.")]
GENERATED = "generated"


@contextmanager
def _errors_for_people() -> Iterator[None]:
    """Mistakes of the user as one line, without a traceback."""
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def train(
    data: DataOption = GENERATED,
    models: ModelsOption = Path("models"),
    category: CategoryOption = None,
    task: Annotated[Task, typer.Option()] = Task.parts,
    preset: Annotated[Preset, typer.Option(help="Sizes and epochs.")] = Preset.small,
    epochs: Annotated[int | None, typer.Option(min=1, help="Else the preset's.")] = None,
    shapes: Annotated[int, typer.Option(min=1, help="Generated, by category.")] = Sizes().num_train,
    weights: Annotated[str, typer.Option(help=f"Of edges: {' or '.join(WEIGHTS)}.")] = WEIGHTS[0],
    tie_pieces: Annotated[
        bool, typer.Option("--tie-pieces", help="An edge between pieces that lie apart.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: DeviceOption = "cpu",
    cache: CacheOption = CACHE,
) -> None:
    """Train a model for each category, and write CATEGORY.safetensors and training.png."""
    with _errors_for_people():
        where = _device(device)
        dataset = _dataset(data, tuple(category or ()), shapes)
        design, schedule = PRESETS[preset]
        design = replace(design, weights=weights, tied=tie_pieces or design.tied)
        schedule = replace(schedule, seed=seed, epochs=epochs or schedule.epochs)
        courses: dict[str, Course] = {}
        for name, kind in dataset.categories.items():
            prepared = _prepared(dataset, "train", name, design, cache, task, resample=True)
            report = _reporter(name)
            model, courses[name] = train_model(
                kind, prepared, design, schedule, task, report, where
            )
            checkpoint.save(model, models / f"{name}.safetensors")
        draw_courses(models / "training.png", courses)
        typer.echo(f"{len(courses)} models are in {models}")


@app.command()
def evaluate(
    data: DataOption = GENERATED,
    models: ModelsOption = Path("models"),
    split: Annotated[str, typer.Option(help="Generated: seen or unseen; ShapeNet: test.")] = "seen",
    category: CategoryOption = None,
    shapes: Annotated[int, typer.Option(min=1, help="As in training.")] = Sizes().num_train,
    device: DeviceOption = "cpu",
    cache: CacheOption = CACHE,
) -> None:
    """Print mIoU, or PCK of keypoints, of the trained models on a split."""
    with _errors_for_people():
        where = _device(device)
        dataset = _dataset(data, tuple(category or ()), shapes)
        trained = {name: _model(models, name).to(where) for name in dataset.categories}
        prepared = {
            name: _prepared(dataset, split, name, model.design, cache, Task(model.task))
            for name, model in trained.items()
        }
        typer.echo("\n".join(evaluate_models(trained, prepared).lines()))


@app.command()
def segment(
    file: Annotated[Path, typer.Argument(help="A mesh, a point cloud, or rows of x y z.")],
    category: Annotated[str, typer.Option(help="What kind of shape it is.")],
    models: ModelsOption = Path("models"),
    output: Annotated[Path, typer.Option(help="Coloured points.")] = Path("coloured.ply"),
    picture: Annotated[Path | None, typer.Option(help="A PNG of them.")] = None,
    points: Annotated[int, typer.Option(min=100, help="On the surface of a mesh.")] = 10_000,
    cache: CacheOption = CACHE,
) -> None:
    """Label every point of a shape with its part."""
    with _errors_for_people():
        model = _model(models, category)
        cloud = read_points(file, points)
        labels = segment_points(model, cloud, BasisCache(cache), source=str(file))
        output.parent.mkdir(parents=True, exist_ok=True)
        write_ply(output, cloud, labels, model.category.parts)
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            draw_shapes(picture, [(file.name, cloud, labels)], 1, model.category.parts)
        counts = np.bincount(labels, minlength=len(model.category.parts))
        for part, count in zip(model.category.parts, counts, strict=True):
            typer.echo(f"{part:<12} {count} points")


@app.command()
def keypoints(
    file: Annotated[Path, typer.Argument(help="A mesh, a point cloud, or rows of x y z.")],
    category: Annotated[str, typer.Option(help="What kind of shape it is.")],
    models: ModelsOption = Path("models"),
    points: Annotated[int, typer.Option(min=100, help="On the surface of a mesh.")] = 10_000,
    cache: CacheOption = CACHE,
) -> None:
    """Print the place of every keypoint, found by a model of `train --task keypoints`."""
    with _errors_for_people():
        model = _model(models, category)
        cloud = read_points(file, points)
        places = find_keypoints(model, cloud, BasisCache(cache), source=str(file))
        for name, (x, y, z) in zip(model.category.keypoints, places, strict=True):
            typer.echo(f"{name:<20} {x:.4g} {y:.4g} {z:.4g}")


@app.command(name="compare")
def compare_networks(
    output: Annotated[Path, typer.Option(help="A folder for results and a picture.")] = Path("out"),
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    network: Annotated[
        list[str] | None, typer.Option(help=f"One of: {', '.join(VARIANTS)}; may be repeated.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = Schedule().epochs,
    shapes: Annotated[
        int, typer.Option(min=1, help="For training, by category.")
    ] = Sizes().num_train,
    category: CategoryOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the runs that results.json has.")
    ] = False,
    cache: CacheOption = CACHE,
) -> None:
    """Train networks on the generated shapes, and print their scores as a table."""
    with _errors_for_people():
        names = network or list(VARIANTS)
        if unknown := [name for name in names if name not in VARIANTS]:
            raise ValueError(f"network is {unknown[0]!r}; it must be one of {list(VARIANTS)}")
        schedule = Schedule(epochs=epochs)
        sizes = Sizes(num_train=shapes)
        torch.set_num_threads(1)  # the networks are too small for more
        comparison = Comparison.on_generated(
            sizes, schedule, BasisCache(cache), typer.echo, tuple(category or ())
        )
        path = output / "results.json"
        results, models, courses = compare(comparison, names, range(seeds), path, resume=resume)
        if models:
            _draw(comparison, models, output / "shapes.png")
            draw_courses(output / "training.png", courses)
        draw_pck(output / "pck.png", {split: mean_pck(results, split) for split in TEST_SPLITS})
        typer.echo(table(results))
        typer.echo(f"results.json, shapes.png, training.png and pck.png are in {output}")


def _draw(comparison: Comparison, models: dict[str, Model], path: Path) -> None:
    """A shape of unseen geometry of each category: its labels, and below them the prediction."""
    chosen = {name: comparison.shapes["unseen"][name][0] for name in models}
    truth = [(name, one.shape.points, one.shape.labels) for name, one in chosen.items()]
    found = [
        (f"found, IoU {models[name].iou(one):.2f}", one.shape.points, models[name].parts(one))
        for name, one in chosen.items()
    ]
    draw_shapes(path, [*truth, *found], columns=len(models))


def _dataset(data: str, categories: tuple[str, ...], shapes: int) -> Dataset:
    if data == GENERATED:
        return generated_set(shapes, Sizes().num_test, REFERENCE_POINTS, 0, categories)
    return shapenet(Path(data), categories)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; it must be cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}; torch finds {torch.cuda.device_count()} GPUs")
    return device


def _model(folder: Path, category: str) -> Model:
    path = folder / f"{category}.safetensors"
    if not path.exists():
        there = sorted(each.stem for each in folder.glob("*.safetensors"))
        raise ValueError(f"category {category!r} has no model in {folder}; there are {there}")
    return checkpoint.load(path)


def _prepared(
    dataset: Dataset,
    split: str,
    category: str,
    design: Design,
    cache: Path,
    task: Task,
    *,
    resample: bool = False,
) -> list[Prepared]:
    rng = np.random.default_rng(0)
    chosen = dataset.of(split, category)
    if resample:
        chosen = [resampled(shape, REFERENCE_POINTS, rng) for shape in chosen]
    typer.echo(f"{category}: eigenpairs of {len(chosen)} shapes")
    return [prepare(shape, design, BasisCache(cache), task) for shape in chosen]


def _reporter(category: str) -> Progress:
    return lambda line: typer.echo(f"{category}: {line}")


def main() -> None:
    """Runs the command."""
    app()


if __name__ == "__main__":
    main()
