"""`aerie train-draft` and `aerie publish-draft` on a tiny model, as their users run them."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from safetensors.torch import load_file

from configs.host import this_host
from configs.resolve import HostConfig, resolve_host
from configs.schema import (
    CacheConfig,
    CacheDirConfig,
    Config,
    ModelConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from drafter.train import checkpoints
from drafter.train.history import History
from drafter.train.results.report import Report
from server.assembly.compose import build_engine
from server.assembly.heads.evaluation import Evaluation, evaluate_draft
from server.assembly.offline import OfflineEngine
from server.text.chat_codec import load_codec
from tests.support.engines.in_process import ask
from tests.support.heads.training_commands import (
    STEPS,
    aerie,
    arguments,
    conversation,
    train,
    weights_of,
    write_lines,
    write_model_and_data,
)
from tests.support.machine.threads import own_torch_threads
from tests.support.servers.live_server import aerie_command, child_environment
from tests.support.waiting import DEADLINE


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    with own_torch_threads():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_data(tmp_path_factory.mktemp("model"))


def engine(folder: Path, cache: Path, head: Path | None) -> HostConfig:
    tree = "root" if head is None else "chain3"
    config = Config(
        model=ModelConfig(source=str(folder / "model"), dtype="float32"),
        cache=CacheConfig(num_blocks=64),
        scheduler=SchedulerConfig(max_num_seqs=4),
        speculation=SpeculationConfig(draft=None if head is None else str(head), tree=tree),
        files=CacheDirConfig(dir=cache),
    )
    return resolve_host(config, this_host())


def texts(folder: Path, cache: Path, head: Path | None) -> dict[str, list[int]]:
    config = engine(folder, cache, head)
    codec = load_codec(config)
    asked = [{"role": "user", "content": "the quick"}], [{"role": "user", "content": "fox"}]
    requests = [
        ask(f"{n} {temperature}", codec.encode(one, True), temperature=temperature, seed=n)
        for n, one in enumerate(asked)
        for temperature in (0.0, 1.0)
    ]
    heard = OfflineEngine(build_engine(config)).generate(requests)
    return {name: completion.token_ids for name, completion in heard.items()}


@pytest.fixture(scope="module")
def run(folder: Path, native_cache: Path) -> Path:
    """A finished run."""
    with own_torch_threads():
        done = train(folder, native_cache, folder / "run")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{folder / 'run' / 'head'}\n"
    assert "eagle3 head of " in done.stderr
    assert f"step {STEPS} of {STEPS}: loss " in done.stderr
    return folder / "run"


def test_a_run_holds_head_log_curve_and_checkpoints(run: Path) -> None:
    names = {
        "checkpoints",
        "head",
        "history.jsonl",
        "learning-curve.svg",
        "config.yaml",
        "run.json",
    }
    assert {path.name for path in run.iterdir()} == names
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-000004",
        "step-000006",
    ]
    measured = [e.step for e in History(run / "history.jsonl").entries if e.kind == "held out"]
    assert measured == [0, 2, 4, 6]
    ElementTree.parse(run / "learning-curve.svg")
    head = load_file(run / "head" / "model.safetensors")
    for name, tensor in weights_of(run).items():
        published = name.replace("layers.0.", "midlayer.")
        assert torch.equal(head[published], tensor.bfloat16()), name


def test_the_head_serves_and_changes_no_text(folder: Path, run: Path, native_cache: Path) -> None:
    assert texts(folder, native_cache, run / "head") == texts(folder, native_cache, None)


def test_a_parallel_head_begins_from_an_eagle3_head_and_changes_no_text(
    folder: Path, run: Path, native_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    changes: dict[str, object] = {
        "head__kind": "peagle",
        "head__init": run / "head",
        "loss__kind": "lk",
        "optimizer__matrices": "muon",
        "data__measure_on": f"[{folder / 'talk.jsonl'}]",
        "run__steps": 2,
    }
    done = train(folder, native_cache, output, **changes)
    assert done.exit_code == 0, done.stderr
    assert "peagle head of " in done.stderr
    assert json.loads((output / "head" / "config.json").read_text())["ptd_token_id"] == 383
    assert texts(folder, native_cache, output / "head") == texts(folder, native_cache, None)


def test_training_again_changes_nothing(folder: Path, run: Path, native_cache: Path) -> None:
    before = weights_of(run)
    done = train(folder, native_cache, run)
    assert done.exit_code == 0
    assert f"resumed at step {STEPS} of {STEPS}" in done.stderr
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(run).items())


def test_a_run_goes_on_from_its_own_settings(
    folder: Path, run: Path, native_cache: Path, tmp_path: Path
) -> None:
    """config.yaml of a run is a configuration: it replaces all options of the command."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert "kernels" not in settings
    words = [f"run.output={tmp_path / 'run'}", "kernels.threads=1", f"files.dir={native_cache}"]
    done = aerie("train-draft", "--config", run / "config.yaml", *words)
    assert done.exit_code == 0, done.stderr
    again = weights_of(tmp_path / "run")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights_of(run).items())


def test_other_settings_are_named_before_anything_is_loaded(
    folder: Path, run: Path, native_cache: Path
) -> None:
    changes = {"head__num_layers": 2, "loss__decay": 0.5, "model__source": "/nowhere"}
    done = train(folder, native_cache, run, **changes)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert "head.num_layers was 1, is now 2; loss.decay was 0.8, is now 0.5" in line


def test_prompts_are_answered_first(folder: Path, native_cache: Path, tmp_path: Path) -> None:
    changes = {"data__conversations": "[]", "data__prompts": f"[{folder / 'prompts.jsonl'}]"}
    done = train(folder, native_cache, tmp_path / "run", **changes, run__steps=1)
    assert done.exit_code == 0, done.stderr
    num_lines = len((tmp_path / "run" / "answers.jsonl").read_text().splitlines())
    assert f"{num_lines} of 11 prompts answered" in done.stderr
    assert (tmp_path / "run" / "head" / "model.safetensors").exists()


def test_by_the_clock_prompts_alone_give_a_head_that_serves(
    folder: Path, native_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    changes: dict[str, object] = {
        "data__conversations": "[]",
        "data__prompts": f"[{folder / 'prompts.jsonl'}]",
        "data__rows": 4,
        "data__max_tokens": 128,
        "run__minutes": 0.02,
        "run__steps": None,
    }
    done = train(folder, native_cache, output, **changes)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{output / 'head'}\n"
    assert "3 held out" in done.stderr
    assert texts(folder, native_cache, output / "head") == texts(folder, native_cache, None)
    entries = History(output / "history.jsonl").entries
    assert [entry.kind for entry in entries[:1] + entries[-1:]] == ["held out", "held out"]
    spent = json.loads((output / "time.json").read_text())
    assert spent["num_learnt"] == entries[-1].num_answer_tokens > 0
    again = train(folder, native_cache, output, **changes)
    assert again.exit_code == 2
    assert "cannot be resumed; set run.output to another folder" in again.stderr


def test_a_head_learns_to_draft_what_its_target_says(
    folder: Path, native_cache: Path, tmp_path: Path
) -> None:
    """Acceptance rises above that of the untrained head, on held-out answers and in the engine."""
    changes: dict[str, object] = {
        "data__conversations": "[]",
        "data__prompts": f"[{folder / 'prompts.jsonl'}]",
        "head__init": "random",
        "optimizer__learning_rate": 0.01,
        "run__batch_tokens": 400,
        "run__evaluate_every": 60,
    }
    found = []
    for steps, rate in ((1, 1e-9), (60, 0.01)):
        output = tmp_path / str(steps)
        changes |= {"run__steps": steps, "optimizer__learning_rate": rate}
        assert train(folder, native_cache, output, **changes).exit_code == 0
        asking = Evaluation(
            folder / "prompts.jsonl",
            None,
            1,
            ("chain3",),
            (0.0,),
            64,
            4,
            compare_ranking=False,
            with_lookup=False,
        )
        report = evaluate_draft(engine(folder, native_cache, output / "head"), asking)
        measured = [e for e in History(output / "history.jsonl").entries if e.kind == "held out"]
        chain = next(one for one in report.measurements if one.tree == "chain3")
        assert chain.num_changed == 0
        found.append((measured[-1].acceptance_length, chain.acceptance_length))
    assert found[1][0] > found[0][0] + 0.05
    assert found[1][1] > found[0][1] + 0.03


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__conversations": "[]"}, "data.conversations or data.prompts must name at least"),
        ({"data__conversations": "[/nowhere]"}, "No such file or directory: '/nowhere'"),
        ({"data__conversations": "[EMPTY]"}, "the file is empty"),
        ({"data__conversations": "[MUTE]"}, "messages hold no answer"),
        ({"data__conversations": "[OUTSIDE]"}, "token id 999 is not in the vocabulary of 384"),
        ({"data__held_out": 11}, "there are 11 examples; data.held_out 11 would leave none"),
        (
            {"data__conversations": "[]", "data__prompts": "[PROMPTS]", "data__held_out": 11},
            "there are 11 prompts to answer; data.held_out 11 would leave none",
        ),
        ({"head__draft_vocab_size": 385}, "head.draft_vocab_size 385 must be at most 384"),
        ({"head__draft_vocab_size": 0}, "head.draft_vocab_size = 0: Input should be greater"),
        ({"head__init": "/nowhere"}, "/nowhere"),
        ({"head__init": "OTHER"}, "the head is for a target of hidden_size 64, this one has 48"),
        ({"head__aux_layers": "[0, 9]"}, "this target has layers 0 to 2"),
        ({"head__colour": "red"}, "unknown key 'head.colour'; known here: kind, num_layers"),
        ({"head__kind": "eagle"}, "head.draft_vocab_size is for eagle3 and peagle heads"),
        ({"loss__tokens": 0}, "loss.tokens and loss.features are both 0"),
        ({"data__rows": 4}, "data.rows is for runs with run.minutes, which is not set"),
        ({"run__minutes": 1}, "run.minutes trains on answers to data.prompts alone: unset data.co"),
        ({"model__source": "/nowhere"}, "/nowhere"),
        ({"kernels__backend": "tpu"}, "kernels.backend"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_left(
    changes: dict[str, object], message: str, folder: Path, native_cache: Path, tmp_path: Path
) -> None:
    from tests.support.heads.tiny_heads import write_tiny_head

    bad = tmp_path / "bad"
    bad.mkdir()
    places = {
        "EMPTY": write_lines(bad / "empty.jsonl", []),
        "MUTE": write_lines(bad / "mute.jsonl", [conversation("the fox")]),
        "OUTSIDE": write_lines(bad / "ids.jsonl", [{"token_ids": [5, 999], "num_prompt": 1}]),
        "OTHER": bad / "head",
        "PROMPTS": folder / "prompts.jsonl",
    }
    if changes.get("head__init") == "OTHER":
        write_tiny_head(bad / "head")
    for word, path in places.items():
        changes = {k: str(v).replace(word, str(path)) for k, v in changes.items()}
    done = train(folder, native_cache, tmp_path / "run", **changes)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("aerie: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on_from_before(
    folder: Path, run: Path, native_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = checkpoints.save_file, [3]

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", save_file)
    done = train(folder, native_cache, tmp_path / "run")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith(f"aerie: {tmp_path}/run/checkpoints/step-000004")
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert not (tmp_path / "run" / "head").exists()
    monkeypatch.undo()
    assert "resumed at step 2" in train(folder, native_cache, tmp_path / "run").stderr
    again = weights_of(tmp_path / "run")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights_of(run).items())


def test_a_file_that_may_not_grow_is_one_line_too(
    folder: Path, native_cache: Path, tmp_path: Path
) -> None:
    """A real error of the system, in the middle of a file."""
    (tmp_path / "empty.yaml").touch()
    words = ["--config", str(tmp_path / "empty.yaml")]
    words += arguments(folder, native_cache, tmp_path / "run")
    done = subprocess.run(
        aerie_command("train-draft", *words),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        env=child_environment(),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("aerie: ")
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_damaged_checkpoint_is_named(
    folder: Path, run: Path, native_cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-000006" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    for done in (
        train(folder, native_cache, tmp_path / "run"),
        aerie("publish-draft", tmp_path / "run", "--output", tmp_path / "out"),
    ):
        assert done.exit_code == 2
        assert f"aerie: {file} is damaged" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_publishing_needs_the_run_alone(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace(str(run.parent), "/gone"))
    report = Report("t", "d", "float32", "cpu", "questions.jsonl", 4, 2, 128, 8, [])
    report.write(tmp_path / "report.json")
    words = ["--output", tmp_path / "new", "--report", tmp_path / "report.json"]
    done = aerie("publish-draft", tmp_path / "run", *words, "card.licence=mit", "card.name=Mine")
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'new'}\n")
    old, new = (load_file(f / "model.safetensors") for f in (run / "head", tmp_path / "new"))
    assert old.keys() == new.keys()
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    card = (tmp_path / "new" / "README.md").read_text()
    assert "# Mine\n" in card
    assert "The weights are under mit." in card
    assert "4 prompts of questions.jsonl" in card
    assert f"| optimizer steps | {STEPS} |" in card
    assert "| files of conversations | " in card
    again = aerie("publish-draft", tmp_path / "run", "--output", tmp_path / "new")
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    small = ["--output", tmp_path / "new", "--replace", "--max-file-bytes", 60_000]
    assert aerie("publish-draft", tmp_path / "run", *small).exit_code == 0
    assert max(f.stat().st_size for f in (tmp_path / "new").iterdir()) <= 60_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["EMPTY"], "holds no checkpoint of a training run"),
        (["RUN", "loss.decay=0.5"], "'loss.decay=0.5': only card.* can be set"),
        (["RUN", "card.colour=red"], "unknown key 'card.colour'"),
        (["RUN", "--report", "/nowhere"], "No such file or directory: '/nowhere'"),
    ],
)
def test_what_cannot_be_published_is_one_line(
    words: list[str], message: str, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "RUN": run}
    out = tmp_path / "out"
    done = aerie("publish-draft", *(places.get(word, word) for word in words), "--output", out)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not out.exists()
