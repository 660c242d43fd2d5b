"""What Ray Serve is told of engines and front ends."""

from __future__ import annotations

import warnings
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings(action="ignore"):  # Ray uses what its libraries deprecate
    pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")

from server.ray import deploy
from server.ray.app import application, engine_options
from server.ray.deploy import check_server
from server.routing.settings import config_of

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]


def options(num_gpus: float = 0, **keys: str) -> dict[str, Any]:
    named = {name.replace("__", "."): value for name, value in keys.items()}
    return engine_options(config_of(named), num_gpus)


def test_one_bundle_holds_the_cores_and_gpus_of_all_ranks() -> None:
    cpu = options(kernels__threads="3")
    assert cpu["placement_group_bundles"] == [{"CPU": 3.0}]
    gpu = options(8, kernels__threads="3", parallel__tensor="4")
    assert gpu["placement_group_bundles"] == [{"CPU": 3.0, "GPU": 4.0}]
    assert gpu["ray_actor_options"] == {"num_cpus": 3.0, "num_gpus": 4.0}
    assert options(8, fleet__gpus="none")["ray_actor_options"]["num_gpus"] == 0


def test_a_largest_number_makes_the_number_follow_the_load() -> None:
    assert options(fleet__replicas="3")["num_replicas"] == 3
    scaling = options(fleet__replicas="2", fleet__max_replicas="5", fleet__use_target="0.5")
    found = scaling["autoscaling_config"]
    assert (found.min_replicas, found.max_replicas, found.upscale_delay_s) == (2, 5, 30)
    assert found.policy.get_policy()(1.0, 1.0)
    assert found.policy.policy_kwargs == {"waiting_target": 8.0, "use_target": 0.5}


def test_engines_get_no_keys(tmp_path: Path) -> None:
    config = config_of({"server.api_keys": "[secret]", "server.admin_keys": "[hush]"})
    front = application(config, 0)._bound_deployment
    ours, engines = front.init_args
    theirs = engines._bound_deployment.init_args[0]
    assert "secret" in ours
    assert "secret" not in theirs
    assert "hush" not in theirs


def test_what_the_http_server_of_ray_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"server\.socket is '/x'"):
        check_server(config_of({"server.socket": "/x"}).server, in_cluster=False)
    with pytest.raises(ValueError, match=r"server\.port is 0"):
        check_server(config_of({"server.port": "0"}).server, in_cluster=True)


@pytest.mark.parametrize(
    ("failures", "address", "error"),
    [
        ([Exception("timed out")] * 2, None, None),
        ([Exception("timed out")] * 9, None, RuntimeError),
        ([ConnectionError("no cluster")], "auto", ConnectionError),
        ([ValueError("a port")], None, ValueError),
    ],
)
def test_a_slow_start_of_ray_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
    failures: list[Exception],
    address: str | None,
    error: type[Exception] | None,
) -> None:
    ended, tries = [], []

    def init(**settings: Any) -> None:
        tries.append(settings["address"])
        if failures:
            raise failures.pop()

    monkeypatch.setattr(deploy.ray, "init", init)
    monkeypatch.setattr(deploy, "end_children", lambda: ended.append(len(tries)))
    if error is None:
        deploy.connect(address)
    else:
        with pytest.raises(error):
            deploy.connect(address)
    assert len(tries) == (3 if address is None and error is not ValueError else 1)
    assert len(ended) == len(tries) - (error is not RuntimeError)


class SlowServe:
    """Ray Serve with an application that is there for so many looks after it was told to end."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def delete(self, name: str, _blocking: bool = True) -> None:
        assert name == deploy.NAME
        if _blocking:
            raise TimeoutError("not deleted after 60s")  # what Ray does, whatever may drain

    def status(self) -> SimpleNamespace:
        self.looks -= 1
        return SimpleNamespace(applications={deploy.NAME: None} if self.looks >= 0 else {})

    def shutdown(self) -> None:
        pass


@pytest.mark.parametrize(("drain_timeout", "ends"), [("900", True), ("0", False)])
def test_an_application_may_drain_for_as_long_as_configured(
    monkeypatch: pytest.MonkeyPatch, drain_timeout: str, ends: bool
) -> None:
    told_to_stop = Event()
    told_to_stop.set()
    monkeypatch.setattr(deploy, "serve", SlowServe(looks=3))
    monkeypatch.setattr(deploy, "LEAVING_TIME", 0.0, raising=False)
    monkeypatch.setattr(deploy, "_stop_signals", lambda: told_to_stop)
    for name in ("connect", "start", "set_up_logging"):
        monkeypatch.setattr(deploy, name, lambda *_: None)
    config = config_of({"server.drain_timeout": drain_timeout, "server.port": "0"})
    if ends:
        assert deploy.deploy(config, None) == 0
    else:
        with pytest.raises(TimeoutError, match="not ended within 0 s"):
            deploy.deploy(config, None)
