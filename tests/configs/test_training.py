"""The configuration of `aerie train-draft`."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.host import host_training_config
from configs.load import ConfigError, as_yaml, load_schema, shipped_configs
from configs.training import TRAIN, TrainingConfig

DATA = "data.conversations=[a.jsonl]"


def load(*overrides: str, path: Path | None = None) -> TrainingConfig:
    return load_schema(TrainingConfig, TRAIN, path, overrides)


@pytest.mark.parametrize("name", sorted(shipped_configs(TRAIN)))
def test_shipped_files_are_whole(name: str) -> None:
    card = load("data.prompts=[a.jsonl]", path=Path(name)).card
    assert card.name != "draft head"
    if name != "sample":  # its data ships, too
        assert (card.licence, card.sources) == ("unknown", ()), "the user's data decide these"


def test_the_sample_needs_no_data() -> None:
    assert load(path=Path("sample")).data.conversations == (Path("sample"),)


def test_host_values_are_filled_in() -> None:
    config = host_training_config(None, [DATA])
    assert config.kernels.threads is not None
    assert config.files.dir is not None


@pytest.mark.parametrize("kind", ["eagle", "dense"])
def test_heads_that_learn_features_have_their_own_defaults(kind: str) -> None:
    config = load(DATA, f"head.kind={kind}")
    assert (config.loss.tokens, config.loss.features, config.loss.feature_noise) == (0.1, 1.0, 0.1)
    assert config.head.init == "random"
    given = load(DATA, f"head.kind={kind}", "loss.features=0", "loss.tokens=2", "head.init=there")
    assert (given.loss.tokens, given.loss.features, given.loss.feature_noise) == (2.0, 0.0, 0.1)
    assert given.head.init == "there"


def test_eagle3_heads_learn_tokens() -> None:
    for config in (load(DATA), load(DATA, "head.kind=eagle3")):
        assert (config.loss.tokens, config.loss.features) == (1.0, 0.0)
        assert (config.loss.feature_noise, config.head.init) == (0.0, "target")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "configuration: data.conversations or data.prompts must name at least one file"),
        ([DATA, "data.limit=5"], "data.limit 5 is for data.prompts, of which there are none"),
        ([DATA, "head.kind=eagle", "head.init=target"], "configuration: head.init 'target' is for"),
        (
            [DATA, "head.kind=dense", "head.aux_layers=[1]"],
            "head.aux_layers is for eagle3 and peagle heads",
        ),
        (
            [DATA, "head.kind=hawk"],
            "head.kind = 'hawk': Input should be 'eagle3', 'peagle', 'eagle' or",
        ),
        ([DATA, "loss.decay=0"], "loss.decay = 0: Input should be greater than 0"),
        ([DATA, "run.steps=true"], "run.steps = 'true': Input should be a valid integer"),
        ([DATA, "head.kind=eagle", "loss.x=1"], "unknown key 'loss.x'; known here: unroll_steps"),
        ([DATA, "server.port=1"], "unknown key 'server'; known here: model, data, head"),
    ],
)
def test_what_is_wrong_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["eagle3", "dense"])
def test_what_is_written_is_read_back(kind: str, tmp_path: Path) -> None:
    words = [f"head.kind={kind}", "loss.features=0.5", "card.name='Ünë: a # b'", "run.output=x y"]
    config = load(DATA, *words)
    path = tmp_path / "config.yaml"
    path.write_text(as_yaml(config, {"files"}), encoding="utf-8")
    assert "files" not in path.read_text()
    assert load(path=path) == config
