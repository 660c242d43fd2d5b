"""Training, checkpoints and the command, on very few points."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="syncspec needs scipy: pip install .[syncspec]")

import numpy as np
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import syncspec
from syncspec import checkpoint
from syncspec.cli import PRESETS, Preset, app
from syncspec.comparison import FULL, VARIANTS, Comparison, Sizes, compare
from syncspec.convolution import KERNELS
from syncspec.features import INPUTS, NUM_FEATURES
from syncspec.generator import CATEGORIES, generate
from syncspec.graph import BasisCache
from syncspec.network import NETWORKS, PAPER, Design, build, stacked
from syncspec.preparing import Prepared, prepare
from syncspec.readers import FIRST_LABELS
from syncspec.segmentation import find_keypoints, segment
from syncspec.tables import mean_pck, table
from syncspec.training import Model, Schedule, _loss, train, turned

TINY = Design(channels=8, grid=8, num_synchronised=6, num_joint=12, transformer_channels=4)
QUICK = Schedule(epochs=6, pretrain_epochs=4, batch_shapes=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> BasisCache:
    return BasisCache(tmp_path_factory.mktemp("bases"), num_pairs=30)


def mugs(
    cache: BasisCache, task: str = "parts", sizes: tuple[int, ...] = (250,) * 4
) -> list[Prepared]:
    shapes = [generate("mug", size, seed) for seed, size in enumerate(sizes)]
    return [prepare(shape, TINY, cache, task) for shape in shapes]


@pytest.fixture(scope="module")
def model(cache: BasisCache) -> Model:
    return train(CATEGORIES["mug"], mugs(cache), TINY, QUICK)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_fall(cache: BasisCache, name: str) -> None:
    tiny = replace(VARIANTS[name], channels=8, grid=8, num_synchronised=6, num_joint=12)
    lines: list[str] = []
    _, course = train(CATEGORIES["mug"], mugs(cache), tiny, QUICK, report=lines.append)
    assert course.labels[-1] < course.labels[0]
    assert len(course.maps) == (4 if tiny.network == "spectral" and tiny.transformer else 0)
    assert course.maps[-1:] <= course.maps[:1]
    assert len(lines) == len(course.labels) + len(course.maps)


def test_keypoints_are_learnt_as_points(cache: BasisCache) -> None:
    shapes = mugs(cache, "keypoints")
    model, course = train(CATEGORIES["mug"], shapes, TINY, QUICK, "keypoints")
    assert course.labels[-1] < course.labels[0]
    assert model.keypoints(shapes[0]).shape == shapes[0].shape.keypoints.shape
    assert model.keypoint_distances(shapes[0]).shape == (5,)
    points = generate("mug", 300, 9).points * 7 + 3
    places = find_keypoints(model, points, cache)
    assert {tuple(place) for place in places} <= {tuple(point) for point in points}
    with pytest.raises(ValueError, match="finds keypoints; this needs one that finds parts"):
        segment(model, points, cache)


def test_shapes_of_other_sizes_train_together(cache: BasisCache) -> None:
    shapes = mugs(cache, sizes=(250, 200, 250))
    _, course = train(CATEGORIES["mug"], shapes, TINY, replace(QUICK, epochs=1))
    assert np.isfinite(course.labels).all()


def test_no_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="'mug' has no shapes"):
        train(CATEGORIES["mug"], [], TINY, QUICK)


def test_the_network_does_not_see_signs_and_order_of_eigenvectors(cache: BasisCache) -> None:
    torch.manual_seed(0)
    network = build(2, TINY).double().eval()
    torch.nn.init.ones_(network.synchronised[-1].norm.weight)
    batch = stacked([one.batch for one in mugs(cache)[:2]])
    batch = batch._make(t.double() if t.is_floating_point() else t for t in batch)
    signs = torch.where(torch.arange(30) % 2 == 0, 1.0, -1.0).double()
    expected = network(batch).scores
    turned = batch._replace(vectors=batch.vectors * signs)
    torch.testing.assert_close(network(turned).scores, expected)
    order = torch.cat([torch.randperm(6), 6 + torch.randperm(24)])  # 6 are synchronised
    other = batch._replace(
        vectors=batch.vectors[..., order], frequencies=batch.frequencies[..., order]
    )
    torch.testing.assert_close(network(other).scores, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_on_another_device_touches_no_tensor_of_the_processor(
    cache: BasisCache, kernel: str
) -> None:
    """On torch's device of shapes without numbers, which every machine has."""
    (one,) = mugs(cache, sizes=(250,))
    meta, stays = torch.device("meta"), one.batch.features.mean((0, 1))
    design = replace(TINY, kernel=kernel)
    model = Model(CATEGORIES["mug"], design, "parts", build(2, design), stays, stays).to(meta)
    loss = _loss(model, model.standardised(one.batch), one.target.to(meta), QUICK)
    torch.autograd.backward(loss)
    assert {p.grad.device for p in model.network.parameters()} == {meta}
    vectors = one.batch.vectors[..., :6].to(meta)
    maps, drawn = torch.empty(1, 6, 12, device=meta), torch.Generator()
    assert {tensor.device for tensor in turned(vectors, maps, drawn)} == {meta}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_sees_its_inputs_alone(cache: BasisCache, network: str) -> None:
    batch = mugs(cache)[0].batch
    for inputs, columns in INPUTS.items():
        seen = build(2, replace(TINY, network=network, inputs=inputs)).eval()
        hidden = torch.ones(NUM_FEATURES, dtype=torch.bool)
        hidden[columns] = False
        other = batch._replace(features=torch.where(hidden, 7.0, batch.features))
        assert torch.equal(seen(other).scores, seen(batch).scores)


def test_synchronised_convolutions_change_nothing_at_the_start(cache: BasisCache) -> None:
    torch.manual_seed(0)
    network = build(2, TINY)
    batch = mugs(cache)[0].batch
    function = torch.randn(1, 250, 2 * TINY.channels)
    maps = network.functional_maps(batch)
    torch.testing.assert_close(network._synchronise(function, batch, maps), function)
    torch.nn.init.ones_(network.synchronised[-1].norm.weight)
    changes = network._synchronise(function, batch, maps) - function
    assert changes.square().mean() > 0.5  # as large as the function itself


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"network": "graph"}, "'graph'"),
        ({"inputs": "normals"}, "'normals'.*no coordinates"),
        ({"weights": "cubic"}, "'cubic'.*gaussian"),
        ({"grid": 10}, "multiple of 4"),
        ({"dilations": (4.0,)}, "2"),
    ],
)
def test_designs_that_cannot_be_built_are_refused(changed: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(TINY, **changed)


def test_a_checkpoint_gives_the_same_scores(
    cache: BasisCache, model: Model, tmp_path: Path
) -> None:
    path = tmp_path / "mug.safetensors"
    checkpoint.save(model, path)
    loaded = checkpoint.load(path)
    one = mugs(cache)[0]
    assert loaded.category == model.category
    torch.testing.assert_close(loaded.scores(one), model.scores(one), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"gone.safetensors is not a file"):
        checkpoint.load(tmp_path / "gone.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"mug.safetensors cannot be read as safetensors"):
        checkpoint.load(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"form": "syncspec-1"})
    with pytest.raises(ValueError, match="form 'syncspec-1'; it must be 'syncspec-2': train it"):
        checkpoint.load(path)


def test_all_points_of_a_large_shape_get_labels(cache: BasisCache, model: Model) -> None:
    points = generate("mug", 2500, 9).points * 7 + 3
    labels = segment(model, points, cache)
    assert labels.shape == (2500,)
    assert set(labels) <= {0, 1}


def test_results_are_kept_and_become_a_table(
    tmp_path: Path, cache: BasisCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("syncspec.comparison.DENSITIES", (150,))
    monkeypatch.setattr("syncspec.comparison.NOISES", (0.02,))
    sizes = Sizes(num_train=2, num_test=1, num_points=200, num_robust=1)
    lines: list[str] = []
    schedule = Schedule(epochs=1, pretrain_epochs=1)
    comparison = Comparison.on_generated(sizes, schedule, cache, lines.append, ("mug", "lamp"))
    names = ["polynomial kernels", FULL]
    results, models, _ = compare(comparison, names, [0], tmp_path / "new" / "results.json")
    assert set(models) == {"mug", "lamp"}
    mug = comparison.shapes["train"]["mug"]
    alone, _ = train(CATEGORIES["mug"], mug, VARIANTS[FULL], schedule)  # not beside another
    torch.testing.assert_close(models["mug"].scores(mug[0]), alone.scores(mug[0]))
    plain, full = results["runs"]
    assert set(full) - set(plain) == {"map_errors", "pck", "robustness", "seconds_per_shape"}
    assert set(full["robustness"]) == {"200 points", "150 points", "noise 0.02"}
    assert set(full["map_errors"]) == {"train", "seen", "unseen"}
    assert (tmp_path / "new" / "results.json").is_file()
    assert "| polynomial kernels | " in table(results)
    assert set(mean_pck(results, "unseen")) == {FULL}
    path = tmp_path / "new" / "results.json"
    kept, models, _ = compare(comparison, names, [0], path, resume=True)
    assert (kept, models) == (json.loads(path.read_text()), {})
    comparison.schedule = replace(schedule, epochs=2)
    with pytest.raises(ValueError, match=r"'epochs': 1.*; to resume, it must be .*'epochs': 2"):
        compare(comparison, names, [0], path, resume=True)


def test_the_command_trains_evaluates_and_segments(tmp_path: Path) -> None:
    for library in ("matplotlib", "trimesh"):
        pytest.importorskip(library, reason="not installed")
    models, cache = ["--models", str(tmp_path / "m")], ["--cache", str(tmp_path / "c")]
    few = ["--category", "mug", "--shapes", "1", *models, *cache]
    trained = CliRunner().invoke(app, ["train", *few, "--epochs", "1"])
    assert trained.exit_code == 0, trained.output
    assert (tmp_path / "m" / "training.png").is_file()
    file = tmp_path / "a.xyz"
    np.savetxt(file, generate("mug", 400, 3).points)
    colours, picture = tmp_path / "new" / "out.ply", tmp_path / "other" / "out.png"
    written = ["--output", str(colours), "--picture", str(picture)]
    done = CliRunner().invoke(
        app, ["segment", str(file), "--category", "mug", *written, *models, *cache]
    )
    assert done.exit_code == 0, done.output
    assert "handle" in done.output
    header = colours.read_text().splitlines()[:5]
    assert header[2:] == ["comment label 0 body", "comment label 1 handle", "element vertex 400"]
    assert picture.stat().st_size > 1000
    apart = [generate("mug", 400, 3).points + np.array([shift, 0, 0]) for shift in (0, 9)]
    np.savetxt(file, np.concatenate(apart))
    refused = CliRunner().invoke(app, ["segment", str(file), "--category", "mug", *models, *cache])
    assert refused.exit_code == 2
    assert re.search(r"a.xyz: the graph .* 2 pieces of \[400, 400\] .*--tie-pieces", refused.output)
    tied = CliRunner().invoke(app, ["train", *few, "--epochs", "1", "--tie-pieces"])
    assert tied.exit_code == 0, tied.output
    (tmp_path / "full" / "mug.safetensors").mkdir(parents=True)
    few[few.index("--models") + 1] = str(tmp_path / "full")
    refused = CliRunner().invoke(app, ["train", *few, "--epochs", "1"])
    assert (refused.exit_code, "error: " in refused.output) == (2, True), refused.output
    done = CliRunner().invoke(
        app, ["segment", str(file), "--category", "mug", *written, *models, *cache]
    )
    assert done.exit_code == 0, done.output


def test_the_commands_of_the_papers_protocol_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two earphones in the layout of ShapeNet, whose cups lie apart, with small sizes."""
    pytest.importorskip("matplotlib", reason="not installed")
    small = replace(TINY, tied=PAPER.tied), replace(QUICK, epochs=1, pretrain_epochs=1)
    monkeypatch.setitem(PRESETS, Preset.paper, small)
    data = tmp_path / "data"
    earphones(data, {"train": "s1", "val": "s1", "test": "s2"})
    common = ["--data", str(data), "--category", "earphone", "--models", str(tmp_path / "m")]
    common += ["--cache", str(tmp_path / "c")]
    for arguments in (["train", "--preset", "paper"], ["evaluate", "--split", "test"]):
        done = CliRunner().invoke(app, [*arguments, *common])
        assert done.exit_code == 0, done.output
    assert re.search(r"category mIoU 0\.\d{4}", done.output)


def earphones(folder: Path, splits: dict[str, str]) -> None:
    """A file of two mugs for each split, and the lists of shapes."""
    lists, synset = folder / "train_test_split", "03261776"
    lists.mkdir(parents=True)
    (folder / synset).mkdir()
    for seed, (split, name) in enumerate(splits.items()):
        cup = generate("mug", 250, seed)
        both = np.concatenate([cup.points, cup.points + np.array([7, 0, 0])])
        labels = np.tile(cup.labels, 2)[:, None] + FIRST_LABELS[5]
        np.savetxt(folder / synset / f"{name}.txt", np.hstack([both, 0 * both, labels]))
        named = json.dumps([f"shape_data/{synset}/{name}"])
        (lists / f"shuffled_{split}_file_list.json").write_text(named)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["segment", "a.ply", "--category", "spoon"], "'spoon' has no model in none; there are []"),
        (["train", "--category", "spoon"], "'spoon' is unknown"),
        (["train", "--data", "none"], "none has no shapes for training"),
        (["compare", "--network", "best"], "network is 'best'"),
        (["train", "--device", "gpu"], "device is 'gpu'; it must be cpu, cuda or cuda:N"),
        (["evaluate", "--device", "cuda:64"], "device is 'cuda:64'; torch finds"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, arguments: list[str], named: str) -> None:
    models = ["--models", "none"] if arguments[0] != "compare" else []
    done = CliRunner().invoke(app, [*arguments, *models, "--cache", str(tmp_path)])
    assert done.exit_code == 2
    assert named in done.output
    assert "Traceback" not in done.output


def test_the_page_shows_the_results_that_are_kept() -> None:
    folder = Path(syncspec.__file__).parent
    results = json.loads((folder / "results" / "results.json").read_text(encoding="utf-8"))
    assert {run["network"] for run in results["runs"]} == set(VARIANTS)
    assert table(results) in (folder / "README.md").read_text(encoding="utf-8")
