"""Networks side by side on the generated set: what each idea of the paper is worth there."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from syncspec.evaluation import evaluate, seconds_per_shape
from syncspec.generator import generate, generated_set
from syncspec.graph import BasisCache
from syncspec.network import Design
from syncspec.preparing import (
    Prepared,
    for_keypoints,
    joint_basis_of,
    map_targets,
    prepare,
)
from syncspec.shapes import Category, Dataset, Shape, noisy
from syncspec.training import Course, Model, Schedule, train

PERCEPTRON_EPOCHS = 2  # times as many as the others
BLIND = "no coordinates"  # only the transformer can tell where on the shape a point is
VARIANTS: Mapping[str, Design] = {
    "perceptron on xyz": Design(network="points", inputs="coordinates"),
    "perceptron on all features": Design(network="points"),
    "polynomial kernels": Design(kernel="polynomial", transformer=False),
    "dilated kernels": Design(transformer=False),
    "dilated kernels, transformer": Design(),
    "polynomial kernels, no coordinates": Design(
        kernel="polynomial", transformer=False, inputs=BLIND
    ),
    "dilated kernels, no coordinates": Design(transformer=False, inputs=BLIND),
    "dilated kernels, transformer, no coordinates": Design(inputs=BLIND),
}
FULL = "dilated kernels, transformer"
PLAIN = "dilated kernels"
OF_KEYPOINTS = ("perceptron on xyz", PLAIN, FULL)  # those that are trained on keypoints, too
TEST_SPLITS = ("seen", "unseen")
DENSITIES = (500, 1000, 4000)
NOISES = (0.01, 0.02, 0.04)
Report = Callable[[str], None]
Trained = dict[str, Model]


@dataclass(frozen=True)
class Sizes:
    """How much to generate, by category."""

    num_train: int = 16
    num_test: int = 12
    num_points: int = 2000
    num_robust: int = 2


@dataclass
class Comparison:
    """Prepared shapes of every split, and how to train on them."""

    data: Dataset
    sizes: Sizes
    schedule: Schedule
    cache: BasisCache
    report: Report
    shapes: dict[str, dict[str, list[Prepared]]] = field(default_factory=dict)

    @classmethod
    def on_generated(
        cls,
        sizes: Sizes,
        schedule: Schedule,
        cache: BasisCache,
        report: Report,
        categories: tuple[str, ...] = (),
    ) -> Comparison:
        data = generated_set(sizes.num_train, sizes.num_test, sizes.num_points, 0, categories)
        this = cls(data, sizes, schedule, cache, report)
        for split in data.splits:
            report(f"eigenpairs of split {split}")
            this.shapes[split] = {
                name: [prepare(shape, Design(), cache) for shape in data.of(split, name)]
                for name in data.categories
            }
        return this

    def train(
        self, design: Design, seed: int, task: str = "parts"
    ) -> tuple[Trained, dict[str, Course]]:
        """A model for each category, as many at once as there are processors.

        The networks are too small to be worth more than one thread each. None of the designs
        has dropout, so that nothing random is common to them.
        """
        schedule = replace(self.schedule, seed=seed)
        if design.network != "spectral":
            schedule = replace(schedule, epochs=schedule.epochs * PERCEPTRON_EPOCHS)
        shapes = self._of("train", task)

        def one(category: Category) -> tuple[Model, Course]:
            return train(category, shapes[category.name], design, schedule, task)

        with ThreadPoolExecutor(os.cpu_count(), "train", torch.set_num_threads, (1,)) as pool:
            found = dict(zip(shapes, pool.map(one, self.data.categories.values()), strict=True))
        models = {name: model for name, (model, _) in found.items()}
        return models, {name: course for name, (_, course) in found.items()}

    def measure(self, models: Trained) -> dict[str, dict[str, float]]:
        """Instance and category mIoU of each test split."""
        found = {split: evaluate(models, self.shapes[split]) for split in TEST_SPLITS}
        return {
            split: {"instance": result.instance_iou, "category": result.category_iou}
            for split, result in found.items()
        }

    def pck(self, design: Design, seed: int) -> dict[str, dict[str, float]]:
        """The share of keypoints within each distance, by test split."""
        models, _ = self.train(design, seed, "keypoints")
        return {split: evaluate(models, self._of(split, "keypoints")).pck for split in TEST_SPLITS}

    def _of(self, split: str, task: str) -> dict[str, list[Prepared]]:
        shapes = self.shapes[split]
        if task == "parts":
            return shapes
        return {name: for_keypoints(found) for name, found in shapes.items()}

    def map_errors(self, models: Trained) -> dict[str, float]:
        """Squares of the errors of predicted maps over squares of the maps, by split."""
        found = {}
        for split, shapes in self.shapes.items():
            errors, sizes = [], []
            for name, model in models.items():
                joint = joint_basis_of(self.shapes["train"][name], model.design)
                targets = map_targets(shapes[name], joint, model.design)
                maps = torch.stack([model.functional_map(one) for one in shapes[name]])
                errors.append(float((maps - targets).square().sum()))
                sizes.append(float(targets.square().sum()))
            found[split] = sum(errors) / sum(sizes)
        return found

    def robustness(self, models: Trained) -> dict[str, float]:
        """Instance mIoU on shapes of seen geometry, as they are, with other densities and noise."""
        rng = np.random.default_rng(0)
        found = {}
        for count in (self.sizes.num_points, *DENSITIES):
            shapes = {name: self._robust(name, count) for name in models}
            found[f"{count} points"] = self._iou_of(models, shapes)
        for deviation in NOISES:
            shapes = {
                name: [noisy(shape, deviation, rng) for shape in self._robust(name)]
                for name in models
            }
            found[f"noise {deviation}"] = self._iou_of(models, shapes)
        return found

    def _robust(self, name: str, num_points: int = 0) -> list[Shape]:
        count = num_points or self.sizes.num_points
        return [generate(name, count, 50_000 + seed) for seed in range(self.sizes.num_robust)]

    def _iou_of(self, models: Trained, shapes: Mapping[str, Sequence[Shape]]) -> float:
        prepared = {
            name: [prepare(shape, Design(), self.cache) for shape in found]
            for name, found in shapes.items()
        }
        return evaluate(models, prepared).instance_iou


def compare(
    comparison: Comparison,
    names: Sequence[str],
    seeds: Sequence[int],
    path: Path,
    *,
    resume: bool = False,
) -> tuple[dict[str, Any], Trained, dict[str, Course]]:
    """Trains every variant with every seed; writes what is known after each to `path`, as JSON.

    With `resume`, runs that the file has are kept, and only the others trained. Returns the
    results, and the models and courses of the last run; there are none if no run was missing.

    Raises:
        ValueError: runs to keep are of other sizes, categories or of another schedule.
    """
    results = _begun(comparison, path, resume=resume)
    done = {(run["network"], run["seed"]) for run in results["runs"]}
    models: Trained = {}
    courses: dict[str, Course] = {}
    for name, seed in [(name, seed) for seed in seeds for name in names]:
        if (name, seed) not in done:
            models, courses = comparison.train(VARIANTS[name], seed)
            run = _run(comparison, name, seed, models)
            run["train_processor_seconds"] = sum(course.seconds for course in courses.values())
            results["runs"].append(run)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            comparison.report(f"{name}, seed {seed}: {_brief(run)}")
    return results, models, courses


def _begun(comparison: Comparison, path: Path, *, resume: bool) -> dict[str, Any]:
    """Results without a run, or those of the file."""
    results: dict[str, Any] = {
        "sizes": asdict(comparison.sizes),
        "categories": sorted(comparison.data.categories),
        "schedule": asdict(comparison.schedule),
        "machine": {"processor": platform.machine(), "torch": torch.__version__},
        "runs": [],
    }
    if not (resume and path.is_file()):
        return results
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in ("sizes", "categories", "schedule"):
        if kept.get(key) != results[key]:
            raise ValueError(
                f"{path} has {key} {kept.get(key)}; to resume, it must be {results[key]}"
            )
    return kept


def _run(comparison: Comparison, name: str, seed: int, models: Trained) -> dict[str, Any]:
    """What is measured of trained models."""
    design = VARIANTS[name]
    run: dict[str, Any] = {"network": name, "seed": seed, "scores": comparison.measure(models)}
    if name in OF_KEYPOINTS:
        run["pck"] = comparison.pck(design, seed)
    if design.transformer and design.network == "spectral":
        run["map_errors"] = comparison.map_errors(models)
    if name in (PLAIN, FULL):
        run["robustness"] = comparison.robustness(models)
        run["seconds_per_shape"] = _seconds(comparison, models)
    return run


def _seconds(comparison: Comparison, models: Trained) -> dict[str, float]:
    name = next(iter(models))
    basis, network = seconds_per_shape(models[name], comparison.data.of("seen", name)[:3])
    return {"eigenpairs and features": basis, "network": network}


def _brief(run: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{split} {run['scores'][split]['instance']:.3f}" for split in TEST_SPLITS)
    return f"mIoU {scores} ({run['train_processor_seconds']:.0f} s of a processor)"
