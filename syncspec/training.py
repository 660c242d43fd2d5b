"""Training the network of one category, and what comes out of it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from syncspec.network import (
    Batch,
    Design,
    PointNetwork,
    Prediction,
    SpectralNetwork,
    build,
    moved,
    stacked,
)
from syncspec.preparing import Prepared, joint_basis_of, map_targets
from syncspec.scores import shape_iou
from syncspec.shapes import Category, Floats, Ints
from syncspec.transformer import far_from_orthonormal

Progress = Callable[[str], None]
Network = SpectralNetwork | PointNetwork
CPU = torch.device("cpu")
SEEDING = threading.Lock()


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. The losses of maps count beside the cross-entropy of labels."""

    epochs: int = 10
    pretrain_epochs: int = 12
    batch_shapes: int = 2
    learning_rate: float = 3e-3
    pretrain_learning_rate: float = 1e-2
    map_learning_rate: float = 1e-4  # of the spectral transformer after pre-training
    orthonormal_weight: float = 0.1
    seed: int = 0


# As published: 20 and 40 epochs, batches of 24 shapes, a transformer that hardly moves any more.
PAPER_SCHEDULE = Schedule(
    epochs=40,
    pretrain_epochs=20,
    batch_shapes=24,
    pretrain_learning_rate=3e-3,
    map_learning_rate=1e-6,
)


@dataclass
class Course:
    """The losses of every epoch, for plots and tables."""

    maps: list[float] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of the processor, in the thread that trained


@dataclass(frozen=True)
class Model:
    """A trained network of one category; `mean` and `deviation` [F] standardise its features."""

    category: Category
    design: Design
    task: str
    network: Network
    mean: Tensor
    deviation: Tensor

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def to(self, device: torch.device) -> Model:
        """The same model in the memory of a device, into which its network moves."""
        mean, deviation = self.mean.to(device), self.deviation.to(device)
        return replace(self, network=self.network.to(device), mean=mean, deviation=deviation)

    def standardised(self, batch: Batch) -> Batch:
        """The batch as the network takes it, on the model's device."""
        batch = moved(batch, self.device)
        return batch._replace(features=(batch.features - self.mean) / self.deviation)

    def scores(self, one: Prepared) -> Tensor:
        """[N, outputs]"""
        self.network.eval()
        with torch.inference_mode():
            prediction: Prediction = self.network(self.standardised(one.batch))
        return prediction.scores[0].cpu()

    def functional_map(self, one: Prepared) -> Tensor:
        """The map that the spectral transformer predicts. [D, J]"""
        assert isinstance(self.network, SpectralNetwork)
        self.network.eval()
        with torch.inference_mode():
            return self.network.functional_maps(moved(one.batch, self.device))[0].cpu()

    def parts(self, one: Prepared) -> Ints:
        """The part of every point. [N]"""
        labels: Ints = self.scores(one).argmax(dim=-1).numpy()
        return labels

    def keypoints(self, one: Prepared) -> Floats:
        """The place of every keypoint, one of the shape's points. [P, 3]"""
        places: Floats = one.shape.points[self.scores(one).argmax(dim=0).numpy()]
        return places

    def iou(self, one: Prepared) -> float:
        """Mean IoU of the category's parts on this shape."""
        return shape_iou(self.parts(one), one.shape.labels, len(self.category.parts))

    def keypoint_distances(self, one: Prepared) -> Floats:
        """How far each keypoint found is from the true one. [P]"""
        distances: Floats = np.linalg.norm(self.keypoints(one) - one.shape.keypoints, axis=1)
        return distances


def train(
    category: Category,
    shapes: Sequence[Prepared],
    design: Design,
    schedule: Schedule,
    task: str = "parts",
    report: Progress = lambda _line: None,
    device: torch.device = CPU,
) -> tuple[Model, Course]:
    """A model of one category, on the device it was trained on.

    Raises:
        ValueError: no shapes.
    """
    if not shapes:
        raise ValueError(f"category {category.name!r} has no shapes to train on")
    names = category.parts if task == "parts" else category.keypoints
    network = _fresh(len(names), design, schedule.seed)
    everything = torch.cat([one.batch.features.flatten(0, 1) for one in shapes])
    mean, deviation = everything.mean(0), everything.std(0).clamp(min=1e-6)
    model = Model(category, design, task, network, mean, deviation)
    model = model.to(device)
    course, start = Course(), time.thread_time()
    if isinstance(model.network, SpectralNetwork) and design.transformer:
        _pretrain(model, shapes, schedule, course, report)
    _fit(model, shapes, schedule, course, report)
    course.seconds = time.thread_time() - start
    return model, course


def _fresh(num_outputs: int, design: Design, seed: int) -> Network:
    """The network of a seed; torch has one source of randomness for all threads."""
    with SEEDING:
        torch.manual_seed(seed)
        return build(num_outputs, design)


def _pretrain(
    model: Model,
    shapes: Sequence[Prepared],
    schedule: Schedule,
    course: Course,
    report: Progress,
) -> None:
    """The spectral transformer learns the maps into the joint basis, by mean squared error.

    A map is linear in the vectors, whatever orthonormal ones these are. So every step turns the
    vectors of every shape at random, and their maps with them: a few shapes give endless pairs.
    """
    network, design = model.network, model.design
    assert isinstance(network, SpectralNetwork)
    targets = map_targets(shapes, joint_basis_of(shapes, design), design).to(model.device)
    rate = schedule.pretrain_learning_rate
    optimiser = torch.optim.Adam(network.transformer.parameters(), rate)
    generator = torch.Generator().manual_seed(schedule.seed)
    pace = _pace(optimiser, schedule.pretrain_epochs * _num_batches(shapes, schedule))
    network.train()
    for epoch in range(schedule.pretrain_epochs):
        losses = []
        for chosen in _batches(shapes, schedule.batch_shapes, generator):
            batch = moved(stacked([shapes[i].batch for i in chosen]), model.device)
            vectors, maps = turned(
                batch.vectors[..., : targets.shape[1]], targets[chosen], generator
            )
            # The sum over J: the squared length of a row's error, and nearly 1 at the start.
            error = (network.transformer(vectors, batch.cells) - maps).square().sum(dim=-1).mean()
            losses.append(_step(optimiser, error))
            pace.step()
        course.maps.append(float(np.mean(losses)))
        report(f"maps {epoch + 1}/{schedule.pretrain_epochs}: loss {course.maps[-1]:.3f}")


def turned(vectors: Tensor, maps: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Other orthonormal vectors of the same space, and their maps. [B, N, D], [B, D, J]"""
    count = vectors.shape[-1]
    noise = torch.randn(len(vectors), count, count, generator=generator, dtype=vectors.dtype)
    turn, _ = torch.linalg.qr(noise.to(vectors.device))  # the same noise on all devices
    return vectors @ turn.transpose(1, 2), turn @ maps


def _fit(
    model: Model,
    shapes: Sequence[Prepared],
    schedule: Schedule,
    course: Course,
    report: Progress,
) -> None:
    """Everything together: cross-entropy, and maps that stay orthonormal."""
    optimiser = torch.optim.Adam(_groups(model.network, schedule))
    pace = _pace(optimiser, schedule.epochs * _num_batches(shapes, schedule))
    generator = torch.Generator().manual_seed(schedule.seed + 1)
    for epoch in range(schedule.epochs):
        model.network.train()
        losses = []
        for chosen in _batches(shapes, schedule.batch_shapes, generator):
            batch = model.standardised(stacked([shapes[i].batch for i in chosen]))
            target = torch.cat([shapes[i].target for i in chosen]).to(model.device)
            losses.append(_step(optimiser, _loss(model, batch, target, schedule)))
            pace.step()
        course.labels.append(float(np.mean(losses)))
        report(f"labels {epoch + 1}/{schedule.epochs}: loss {course.labels[-1]:.3f}")


def _loss(model: Model, batch: Batch, target: Tensor, schedule: Schedule) -> Tensor:
    scores, maps = model.network(batch)
    # Of parts at each point, or of points for each keypoint.
    logits = scores.transpose(1, 2) if model.task == "parts" else scores
    loss = nn.functional.cross_entropy(logits, target)
    if maps is not None:
        loss = loss + schedule.orthonormal_weight * far_from_orthonormal(maps)
    return loss


def _groups(network: Network, schedule: Schedule) -> list[dict[str, object]]:
    """Parameters by their learning rate."""
    slow = [p for name, p in network.named_parameters() if name.startswith("transformer.")]
    fast = [p for name, p in network.named_parameters() if not name.startswith("transformer.")]
    groups: list[dict[str, object]] = [{"params": fast, "lr": schedule.learning_rate}]
    return [*groups, {"params": slow, "lr": schedule.map_learning_rate}] if slow else groups


def _pace(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Up to the learning rate of each group and down again."""
    rates = [float(group["lr"]) for group in optimiser.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=max(steps, 2))


def _num_batches(shapes: Sequence[Prepared], schedule: Schedule) -> int:
    return len(_batches(shapes, schedule.batch_shapes, torch.Generator()))


def _batches(shapes: Sequence[Prepared], size: int, generator: torch.Generator) -> list[list[int]]:
    """Numbers of shapes in random order; those of a batch have equally many points."""
    by_points: dict[int, list[int]] = defaultdict(list)
    for number in torch.randperm(len(shapes), generator=generator).tolist():
        by_points[len(shapes[number].shape.points)].append(number)
    return [
        numbers[start : start + size]
        for numbers in by_points.values()
        for start in range(0, len(numbers), size)
    ]


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> float:
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    optimiser.step()
    return float(loss.detach())
