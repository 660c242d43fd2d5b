"""Sources of the configuration: which one wins, and the error for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import ConfigError, load_config, shipped_configs
from configs.schema import Config


def refusal(
    overrides: list[str], path: Path | None = None, environment: dict[str, str] | None = None
) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, environment)
    return str(caught.value)


def value_of(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "aerie.yaml"


def test_without_any_source_everything_has_its_default() -> None:
    assert load_config() == Config()


def test_environment_wins_over_the_file_and_overrides_win_over_both(file: Path) -> None:
    file.write_text("server: {host: file, port: 1}\nlog: {level: error}\nmodel: {source: file}\n")
    environment = {"AERIE_SERVER__HOST": "environment", "AERIE_SERVER__PORT": "2"}
    config = load_config(file, ["server.port=3"], environment)
    assert (config.server.host, config.server.port) == ("environment", 3)
    assert (config.log.level, config.model.source) == ("error", "file")


def test_the_last_of_equal_overrides_wins() -> None:
    assert load_config(None, ["server.port=1", "server.port=2"]).server.port == 2


def test_overrides_reach_sections_that_the_file_has_not(file: Path) -> None:
    file.write_text("log: {level: error}\n")
    config = load_config(file, ["cache.num_blocks=7"])
    assert (config.log.level, config.cache.num_blocks) == ("error", 7)


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n", "model:\n  # dtype: float32\n"])
def test_a_file_without_keys_leaves_the_defaults(file: Path, text: str) -> None:
    file.write_text(text)
    assert load_config(file) == Config()


@pytest.mark.parametrize(
    "ignored",
    [
        {"PATH": "/bin", "AERIE": "1", "XAERIE_SERVER__PORT": "1"},
        {"AERIE_CONFIG": "smollm2"},
        {"AERIE_SERVICE_HOST": "10.0.0.1", "AERIE_SERVICE_PORT": "80"},
        {"AERIE_PORT": "tcp://10.0.0.1:80", "AERIE_WEB_PORT": "udp://10.0.0.1:80"},
        {"AERIE_WEB_PORT_80_TCP_ADDR": "10.0.0.1", "AERIE_WEB_SERVICE_PORT_HTTP": "80"},
    ],
    ids=["foreign", "path-of-the-file", "service", "service-address", "service-ports"],
)
def test_variables_that_are_not_ours_are_left_alone(ignored: dict[str, str]) -> None:
    assert load_config(environment=ignored) == Config()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.max_model_len=null", None),
        ("model.served_name=a name", "a name"),
        ("model.served_name='123'", "123"),
        ("model.served_name=a=b", "a=b"),
        ("model.chat_template=some/file.jinja", Path("some/file.jinja")),
        ("server.api_keys=[a, b]", ("a", "b")),
        ("server.api_keys=[]", ()),
        ("server.api_keys=sk-#1: a", ("sk-#1: a",)),
        ("server.api_keys='a, b'", ("a, b",)),
        ("server.api_keys=sk-1, 017 ,sk-*", ("sk-1", "017", "sk-*")),
        ("server.drain_timeout=1e3", 1000.0),
        ("server.drain_timeout=2", 2.0),
        ("server.drain_timeout=0.5", 0.5),
        ("speculation.aux_layers=outputs", "outputs"),
        ("speculation.aux_layers=[2, 16, 29]", (2, 16, 29)),
        ("cache.prefix_caching=false", False),
        (" server.port =0", 0),
    ],
)
def test_overrides_and_variables_mean_the_same(override: str, value: object) -> None:
    key, _, text = override.partition("=")
    variable = {f"AERIE_{key.strip().upper().replace('.', '__')}": text}
    assert value_of(load_config(None, [override]), key.strip()) == value
    assert value_of(load_config(environment=variable), key.strip()) == value


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("server.port=true", "'true'"),
        ("server.port='80'", "'80'"),
        ("server.port=80.0", "'80.0'"),
        ("server.port=65536", "65536"),
        ("server.port=-1", "-1"),
        ("server.port=", "None"),
        ("scheduler.max_num_seqs=0", "0"),
        ("server.drain_timeout=.nan", "nan"),
        ("server.drain_timeout=.inf", "inf"),
        ("server.drain_timeout=true", "'true'"),
        ("server.drain_timeout=-0.1", "-0.1"),
        ("cache.memory_fraction=.nan", "nan"),
        ("cache.memory_fraction=0", "0"),
        ("cache.memory_fraction=0.96", "0.96"),
        ("cache.prefix_caching=1", "'1'"),
        ("cache.block_size=32", "32"),
        ("model.dtype=float16", "'float16'"),
        ("kernels.backend=cuda", "'cuda'"),
        ("kernels.threads=[1]", "'[1]'"),
    ],
)
def test_a_wrong_value_is_shown_with_its_key(override: str, value: str) -> None:
    key = override.partition("=")[0]
    assert f"{key} = {value}: " in refusal([override])


def test_choices_are_listed() -> None:
    message = refusal(["model.dtype=int8"])
    assert "'bfloat16'" in message
    assert "'float32'" in message


@pytest.mark.parametrize("value", ["{hunter2: 1}", "[hunter2, [22]]", "[hunter2, '***']"])
def test_keys_of_clients_are_never_shown(value: str) -> None:
    message = refusal([f"server.api_keys={value}"])
    assert "server.api_keys" in message
    assert "hunter2" not in message
    assert "22" not in message


@pytest.mark.parametrize("keys", ["api_keys", "admin_keys"])
def test_what_stands_for_a_key_that_is_not_shown_is_no_key(keys: str, file: Path) -> None:
    file.write_text(f"server:\n  {keys}: [a, '***']\n")
    message = refusal([], file)
    assert f"server.{keys} = ***: *** stands for a key that was not shown" in message


def test_an_unknown_key_names_its_neighbours() -> None:
    message = refusal(["model.dtyp=float32"])
    assert "unknown key 'model.dtyp'; known here: source, revision, served_name, dtype" in message


def test_an_unknown_section_names_the_sections() -> None:
    expected = "unknown key 'modle'; known here: model, cache, scheduler, speculation"
    assert expected in refusal(["modle.dtype=float32"])
    assert expected in refusal([], None, {"AERIE_MODLE__DTYPE": "float32"})


def test_all_mistakes_of_a_file_are_reported_at_once_with_its_name(file: Path) -> None:
    file.write_text("model: {dtype: int8, typo: 1}\nserver: {port: -1}\n")
    message = refusal([], file)
    assert str(file) in message
    for key in ("model.dtype = 'int8'", "'model.typo'", "server.port = -1"):
        assert key in message


@pytest.mark.parametrize(
    ("override", "explanation"),
    [
        ("server.port", "'server.port' is not of the form section.key=value"),
        ("", "'' is not of the form section.key=value"),
        ("port=1", "'port' does not name a key of a section"),
        ("server.port.x=1", "'server.port.x' does not name a key of a section"),
        ("=1", "'' does not name a key of a section"),
        ("server.api_keys=[a", "the value of server.api_keys is not YAML"),
        ("server.host='a'b'", "the value of server.host is not YAML"),
    ],
)
def test_a_malformed_override_is_refused(override: str, explanation: str) -> None:
    assert explanation in refusal([override])


@pytest.mark.parametrize("name", ["AERIE_SERVER_PORT", "AERIE_SERVER__PORT__X", "AERIE_PORT"])
def test_a_malformed_variable_is_refused_by_its_own_name(name: str) -> None:
    message = refusal([], None, {name: "80"})
    assert f"{name!r} does not name a key of a section" in message


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        ("- a\n", "must hold sections"),
        ("word\n", "must hold sections"),
        ("model: [1\n", "cannot be read as YAML"),
        ("\tmodel: 1\n", "cannot be read as YAML"),
        ("model: !!python/name:os.system\n", "cannot be read as YAML"),
        ("log: {level: 2026-13-45}\n", "log.level = '2026-13-45'"),
        ("{[a]: 1}\n", "cannot be read as YAML"),
        ("model: {dtype: float32, dtype: bfloat16}\n", "key 'dtype' is written twice"),
        ("log: {level: info}\nlog: {format: json}\n", "key 'log' is written twice"),
        ("model: 7\n", "model = '7'"),
        ("1: {a: 2}\n", "1"),
    ],
)
def test_an_unusable_file_is_refused_by_name(file: Path, text: str, explanation: str) -> None:
    file.write_text(text)
    message = refusal([], file)
    assert str(file) in message
    assert explanation in message


def test_a_section_that_is_a_value_cannot_be_overridden(file: Path) -> None:
    file.write_text("server: fast\n")
    assert "section 'server' must hold keys, not 'fast'" in refusal(["server.port=1"], file)


def test_bytes_that_are_no_text_are_refused(file: Path) -> None:
    file.write_bytes(b"model: \xff\n")
    assert "cannot be read as YAML" in refusal([], file)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "cannot be read as YAML" in refusal([], tmp_path)


def test_a_missing_file_lists_those_that_are_shipped() -> None:
    message = refusal([], Path("smollm3"))
    assert "no configuration file 'smollm3'; shipped ones: " in message
    for name in shipped_configs():
        assert name in message


def test_shipped_files_are_found_by_name() -> None:
    names = set(shipped_configs())
    assert {"smollm2", "smollm2-fp32"} <= names
    assert load_config(Path("smollm2-fp32")).model.dtype == "float32"


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_file_loads_by_name_and_by_path(name: str) -> None:
    assert load_config(Path(name)) == load_config(shipped_configs()[name])
