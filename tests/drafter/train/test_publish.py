"""A published head is complete and finite, or does not exist; its card shows the measurements."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from drafter.checkpoint import load_head
from drafter.heads.building import LoadedHead
from drafter.heads.config import HeadConfig
from drafter.heads.eagle import EagleHead
from drafter.heads.untrained import eagle3_config, random_eagle3
from drafter.train.results import publish as publishing
from drafter.train.results.model_card import DataSource, ModelCard
from drafter.train.results.publish import publish
from drafter.train.results.report import Measurement, Report
from engine.checkpoints import written
from kernels.ops import Ops
from tests.drafter.published_heads import DRAFT_VOCAB, LAYOUTS, TARGET, TargetWeights

CONFIG = eagle3_config(TARGET, DRAFT_VOCAB)
IDS = LAYOUTS["reference-eagle3"].target_ids()
CHAIN = Measurement("chain2", 0.0, True, 40, 1.9, (0.6, 0.3), (0.6, 0.5), 76, 20.0, 1.4, 0)
ROOT = Measurement("root", 0.0, True, 0, 1.0, (), (), 76, 14.0, 1.0, 0)
CARD = ModelCard(
    name="A head",
    summary="Drafts for the target.",
    target="someone/Target-1B",
    licence="apache-2.0",
    sources=(
        DataSource("Questions | and more", "https://example.org/data", "cc-by-4.0", "1,200"),
        DataSource("Own prompts", "https://example.org/own", "apache-2.0", "all 40"),
    ),
    training={"steps": 300, "learning rate": 1e-4},
    report=Report("t", "d", "bfloat16", "cpu", "p.jsonl", 4, 2, 128, 8, [ROOT, CHAIN]),
)

Tensors = dict[str, Tensor]


def tensors(seed: int = 1) -> Tensors:
    return random_eagle3(CONFIG, TARGET, seed)


def put(path: Path, weights: Tensors, **options: bool | int) -> None:
    publish(path, CONFIG, TARGET, weights, IDS, CARD, **options)  # type: ignore[arg-type]


def load(path: Path, ops: Ops) -> LoadedHead:
    return load_head(path, TargetWeights.of(ops).builder())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_published_head_is_rounded_and_loads(reference_ops: Ops, tmp_path: Path) -> None:
    weights = tensors()
    put(tmp_path / "heads" / "new", weights)
    head = load(tmp_path / "heads" / "new", reference_ops)
    assert head.target_ids is not None
    assert torch.equal(head.target_ids, IDS)
    stored = load_file(tmp_path / "heads" / "new" / "model.safetensors")
    assert torch.equal(stored["fc.weight"], weights["fc.weight"].bfloat16())
    assert {t.dtype for name, t in stored.items() if name.endswith("weight")} == {torch.bfloat16}
    assert [path.name for path in (tmp_path / "heads").iterdir()] == ["new"]  # nothing left behind
    assert (tmp_path / "heads" / "new" / "README.md").read_text() == CARD.render()


def test_files_stay_within_the_limit(reference_ops: Ops, tmp_path: Path) -> None:
    put(tmp_path / "head", tensors(), max_shard_bytes=50_000)
    sizes = [file.stat().st_size for file in (tmp_path / "head").iterdir()]
    assert len(sizes) > 4
    assert max(sizes) <= 50_000
    load(tmp_path / "head", reference_ops)


@pytest.mark.parametrize("name", ["reference-eagle", "meta-dense"])
def test_heads_of_the_first_kind_are_published_too(
    name: str, reference_ops: Ops, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    config = HeadConfig.from_json(layout.config)
    publish(tmp_path / "head", config, TARGET, layout.tensors(), None, CARD)
    assert isinstance(load(tmp_path / "head", reference_ops), EagleHead)
    with pytest.raises(ValueError, match="target_ids is set, but an 'eagle' head"):
        publish(tmp_path / "other", config, TARGET, layout.tensors(), IDS, CARD)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3.4e38])
def test_weights_that_are_not_finite_in_bfloat16_are_refused(value: float, tmp_path: Path) -> None:
    weights = tensors()
    weights["norm.weight"][7] = value
    with pytest.raises(ValueError, match=r"tensor norm\.weight: 1 of 72 values are not finite"):
        put(tmp_path / "head", weights)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_head_stays_unless_replacing_is_asked_for(
    reference_ops: Ops, tmp_path: Path
) -> None:
    path = tmp_path / "head"
    put(path, tensors(), max_shard_bytes=50_000)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="exists already"):
        put(path, tensors(2))
    assert contents(tmp_path) == before
    put(path, tensors(2), replace=True)
    files = {f"head/{name}" for name in ("README.md", "config.json", "model.safetensors")}
    assert contents(tmp_path).keys() == files  # no shard of the old head among them
    stored = load_file(path / "model.safetensors")
    assert torch.equal(stored["fc.weight"], tensors(2)["fc.weight"].bfloat16())


@pytest.mark.parametrize("other", ["notes.txt", "checkpoints/step-000003/weights.safetensors"])
def test_only_a_head_can_be_replaced(other: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    put(path, tensors())
    (path / other).parent.mkdir(parents=True, exist_ok=True)
    (path / other).write_text("hours of work")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="only a head can be replaced"):
        put(path, tensors(2), replace=True)
    with pytest.raises(FileExistsError, match="only a head can be replaced"):
        put(path / other, tensors(2), replace=True)
    assert contents(tmp_path) == before


def disk_is_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_at_second_file(monkeypatch: pytest.MonkeyPatch) -> None:
    real = written.save_file

    def save(part: Tensors, path: Path, **options: object) -> None:
        if "00001" not in path.name:
            path.write_bytes(b"half of it")
            disk_is_full()
        real(part, path, **options)

    monkeypatch.setattr(written, "save_file", save)


def full_at_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelCard, "render", disk_is_full)


def full_at_the_second_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if self.name == "new" and to.name == "head":
            disk_is_full()
        return real(self, to)

    monkeypatch.setattr(publishing.Path, "rename", rename)  # type: ignore[attr-defined]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fill", [full_at_second_file, full_at_the_card, full_at_the_second_rename])
def test_a_full_disk_leaves_all_as_it_was(
    fill: Callable[[pytest.MonkeyPatch], None],
    existing: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if existing:
        put(tmp_path / "head", tensors())
    before = contents(tmp_path)
    fill(monkeypatch)
    with pytest.raises(OSError, match="No space left on device"):
        put(tmp_path / "head", tensors(2), replace=True, max_shard_bytes=50_000)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["head"] if existing else [])


def test_the_card_names_target_data_settings_and_licence() -> None:
    _, front, body = CARD.render().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "base_model": "someone/Target-1B",
        "library_name": "safetensors",
        "tags": ["eagle", "speculative-decoding", "draft-model"],
    }
    lines = body.splitlines()
    assert "# A head" in lines
    assert r"| [Questions \| and more](https://example.org/data) | cc-by-4.0 | 1,200 |" in lines
    assert "| [Own prompts](https://example.org/own) | apache-2.0 | all 40 |" in lines
    assert "| steps | 300 |" in lines
    assert "| learning rate | 0.0001 |" in lines
    assert "The weights are under apache-2.0." in lines


def test_the_card_shows_measured_trees_only() -> None:
    lines = CARD.render().splitlines()
    assert "| 0 | chain2 | yes | 1.90 | 0.60 0.50 |" in lines
    assert not any("root" in line for line in lines)
    about = next(line for line in lines if line.startswith("4 prompts of p.jsonl"))
    assert "up to 2 turns, up to 128 tokens per answer, 8 at a time" in about


def test_a_card_without_sources_says_so() -> None:
    card = dataclasses.replace(CARD, sources=()).render()
    assert "source of this head's training text was not stated" in card
    assert "| source |" not in card
