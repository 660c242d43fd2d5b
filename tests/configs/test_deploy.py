"""Files for operations under configs/deploy: what they name exists."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.schema import Config
from engine.messages import EngineStats
from server.routing.settings import config_of
from server.text.tokens.tokenizer import Tokenizer
from tests.support.servers.http_server import Server, tiny_tokenizer

DEPLOY = Path(__file__).resolve().parents[2] / "configs" / "deploy"
DOCUMENTS = sorted(path for path in DEPLOY.rglob("*.yaml"))
KUBERNETES = DEPLOY / "kubernetes"
RAY = DEPLOY / "ray"
METRIC = re.compile(r"aerie:\w+")
GROUPING = re.compile(r"by \(([^)]*)\)")
OWN_LABELS = {"instance"}  # added by Prometheus
BUSY = EngineStats(
    num_running=1,
    num_waiting=0,
    kv_usage=0.5,
    prefix_queries=1,
    prefix_hits=1,
    num_preemptions=0,
    num_steps=1,
    last_step_tokens=1,
    num_drafts=1,
    num_draft_tokens=1,
    num_accepted_tokens=1,
    accepted_per_position=(1,),
    steps_by_tree={"chain3": 1},
    seconds_by_part={"draft": 0.1},
)


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def dashboard() -> Any:
    return json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))


def expressions() -> Iterator[str]:
    """All queries that the files send to Prometheus."""
    yield from (target["expr"] for panel in dashboard()["panels"] for target in panel["targets"])
    yield from (
        rule["expr"]
        for group in loaded(DEPLOY / "alerts.yaml")["groups"]
        for rule in group["rules"]
    )
    for trigger in loaded(KUBERNETES / "autoscaling.yaml")["spec"]["triggers"]:
        yield trigger["metadata"]["query"]


@pytest.fixture(scope="module")
def exposition(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What /metrics of a server that works says."""
    tokenizer: Tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    server = Server(tokenizer)
    server.engine.stats = BUSY
    server.chat()
    return server.get("/metrics").text


@pytest.fixture(scope="module")
def samples(exposition: str) -> dict[str, set[str]]:
    """Names of the metrics, with their labels."""
    found: dict[str, set[str]] = {}
    for line in exposition.splitlines():
        if not line.startswith("#"):
            name, _, labels = line.partition("{")
            found.setdefault(name.split(" ")[0], set()).update(re.findall(r'(\w+)="', labels))
    return found


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_queries_name_metrics_and_labels_that_exist(
    samples: dict[str, set[str]], expression: str
) -> None:
    names = METRIC.findall(expression)
    assert names or expression.startswith("up{")
    assert [name for name in names if name not in samples] == []
    labels = {label.strip() for group in GROUPING.findall(expression) for label in group.split(",")}
    known = set().union(*(samples[name] for name in names)) if names else set()
    assert labels <= known | OWN_LABELS


def test_panels_do_not_lie_on_each_other() -> None:
    places = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in dashboard()["panels"]
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_images_have_versions_and_mounted_files_exist(path: Path) -> None:
    found = next(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    for service in found.get("services", {}).values():
        image = service["image"]
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", image)
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists()


def test_there_is_more_time_to_stop_than_to_drain() -> None:
    drain = Config().server.drain_timeout
    server = loaded(DEPLOY / "compose.yaml")["x-server"]
    pod = loaded(KUBERNETES / "deployment.yaml")["spec"]["template"]["spec"]
    unit = (DEPLOY / "aerie.service").read_text(encoding="utf-8")
    assert int(server["stop_grace_period"].removesuffix("s")) > drain
    assert pod["terminationGracePeriodSeconds"] > drain
    assert int(re.findall(r"TimeoutStopSec=(\d+)", unit)[0]) > drain


def test_the_kustomization_lists_every_manifest() -> None:
    listed = loaded(KUBERNETES / "kustomization.yaml")["resources"]
    manifests = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(listed) == manifests


def pods_of_ray() -> Iterator[Any]:
    """The pods of the manifests that start a Ray cluster."""
    spec = loaded(RAY / "rayservice.yaml")["spec"]["rayClusterConfig"]
    yield from (each["template"] for each in (spec["headGroupSpec"], *spec["workerGroupSpecs"]))
    leaders = next(yaml.safe_load_all((RAY / "leaderworkerset.yaml").read_text(encoding="utf-8")))
    group = leaders["spec"]["leaderWorkerTemplate"]
    yield from (group["leaderTemplate"], group["workerTemplate"])


def test_applications_of_ray_have_settings_that_exist() -> None:
    embedded = yaml.safe_load(loaded(RAY / "rayservice.yaml")["spec"]["serveConfigV2"])
    for serve in (loaded(RAY / "serve.yaml"), embedded):
        (application,) = serve["applications"]
        module, _, function = application["import_path"].partition(":")
        assert function in vars(importlib.import_module(module))
        config = config_of(application["args"])
        assert config.server.host == serve["http_options"]["host"]
        assert config.server.port == serve["http_options"]["port"]


def test_the_pods_of_ray_are_valid_and_have_time_to_drain() -> None:
    pods = list(pods_of_ray())
    assert len(pods) == 4
    for pod in pods[1:]:
        assert pod["spec"]["terminationGracePeriodSeconds"] > Config().server.drain_timeout
    checker = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    validate: Callable[..., object] = checker.validate
    for pod in pods:
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **pod}
        validate(whole | {"metadata": {"name": "p"}}, checker.latest_version(), strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_overlay_for_cpus_needs_neither_gpus_nor_operators() -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", "kubernetes-cpu"],
        cwd=DEPLOY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    manifests = list(yaml.safe_load_all(done.stdout))
    kinds = {manifest["kind"] for manifest in manifests}
    assert kinds == {"Deployment", "Service", "PodDisruptionBudget"}
    assert "nvidia.com/gpu" not in done.stdout
    assert "image: aerie:latest" in done.stdout


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "alerts.yaml"), ("check", "config", "--syntax-only", "prometheus.yaml")],
)
def test_prometheus_accepts_its_files(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Names that vLLM's dashboards know, which a new metric should not imitate.
NAMED_AS_IN_VLLM = (
    "metric names should not contain ':'",
    'iteration_tokens_total non-counter metrics should not have "_total" suffix',
)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_accepts_the_metrics(exposition: str) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=exposition,
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = (done.stdout + done.stderr).splitlines()
    assert [each for each in complaints if not each.endswith(NAMED_AS_IN_VLLM)] == []


def test_compose_accepts_its_file() -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is missing")
    check = ("-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec")
    done = subprocess.run(
        [sys.executable, *check, str(DEPLOY / "compose.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["deployment", "service", "disruption"])
def test_kubernetes_accepts_its_manifests(name: str) -> None:
    checker = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    validate: Callable[..., object] = checker.validate
    validate(loaded(KUBERNETES / f"{name}.yaml"), checker.latest_version(), strict=True)
