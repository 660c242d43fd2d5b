"""The application of Ray Serve: `aerie deploy ray` runs it, and so does `serve run`.

serve run aerie:ray config=smollm2 replicas=2
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingPolicy,
    BackpressureConfig,
    RequestRouterConfig,
)

from configs.redact import without_secrets
from configs.schema import Config
from server.ray.engine import EngineReplica
from server.ray.front import Front
from server.ray.router import EngineRouter
from server.ray.scaling import EnginesForLoad
from server.routing.settings import check_one_engine, config_of, engine_cpus, with_threads

ENGINE, FRONT = "engine", "front"
HEALTH_PERIOD = 1.0  # seconds between looks of Ray Serve at a replica
HEALTH_TIMEOUT = 30.0  # seconds; a busy machine is not a dead one
START_TRIES = 3  # of a replica, until the deployment has failed
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # front ends log requests
_COMMON = {
    "graceful_shutdown_wait_loop_s": 0.2,
    "health_check_period_s": HEALTH_PERIOD,
    "health_check_timeout_s": HEALTH_TIMEOUT,
    "max_constructor_retry_count": START_TRIES,
    "logging_config": QUIET,
}
MAX_CONNECTIONS = 100_000  # requests in a front end; its own limits are lower


def build(arguments: dict[str, str]) -> serve.Application:
    """The application, for arguments as in `config_of`. ConfigError as there."""
    return application(config_of(arguments), cluster_gpus())


def cluster_gpus() -> float:
    """GPUs of the cluster, once there is one."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0.0


def application(config: Config, num_gpus: float) -> serve.Application:
    """The application for this configuration, in a cluster with so many GPUs. ConfigError if a
    replica cannot have it."""
    check_one_engine(config)
    config = with_threads(config)
    engines = serve.deployment(**engine_options(config, num_gpus))(EngineReplica)
    fronts = serve.deployment(**front_options(config))(Front)
    return fronts.bind(
        config.model_dump_json(), engines.bind(without_secrets(config).model_dump_json())
    )


def engine_options(config: Config, num_gpus: float) -> dict[str, Any]:
    """How Ray Serve runs engines. The one bundle of a placement group has the cores and GPUs of
    all ranks, because they share memory: they are on one machine."""
    fleet, server = config.fleet, config.server
    bundle = {"CPU": engine_cpus(config)}
    if fleet.gpus == "auto" and num_gpus:
        bundle["GPU"] = float(config.parallel.tensor)
    options: dict[str, Any] = {
        "name": ENGINE,
        **_COMMON,
        "ray_actor_options": {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0.0)},
        "placement_group_bundles": [bundle],
        "placement_group_strategy": "STRICT_PACK",
        # Engines queue what they cannot run yet, and admission limits it.
        "max_ongoing_requests": server.max_queued_choices + config.scheduler.max_num_seqs,
        "graceful_shutdown_timeout_s": server.drain_timeout,
        "request_router_config": RequestRouterConfig(
            request_router_class=EngineRouter,
            request_router_kwargs={
                "routing": fleet.routing,
                "bound": fleet.load_bound,
                "num_blocks": fleet.prefix_blocks,
            },
        ),
    }
    if fleet.max_replicas is None:
        return options | {"num_replicas": fleet.replicas}
    return options | {"autoscaling_config": _autoscaling(config)}


def _autoscaling(config: Config) -> AutoscalingConfig:
    fleet = config.fleet
    return AutoscalingConfig(
        min_replicas=fleet.replicas,
        max_replicas=fleet.max_replicas,
        upscale_delay_s=fleet.scale_up_delay,
        downscale_delay_s=fleet.scale_down_delay,
        look_back_period_s=fleet.load_window,
        policy=AutoscalingPolicy(
            policy_function=EnginesForLoad,
            policy_kwargs={
                "waiting_target": fleet.waiting_target,
                "use_target": fleet.use_target,
            },
        ),
    )


def front_options(config: Config) -> dict[str, Any]:
    """How Ray Serve runs front ends. They start once, and hold open requests while they drain."""
    server = config.server
    return {
        "name": FRONT,
        **_COMMON,
        "num_replicas": config.fleet.fronts,
        "ray_actor_options": {"num_cpus": 0.0},
        "max_ongoing_requests": MAX_CONNECTIONS,
        "graceful_shutdown_timeout_s": server.drain_timeout,
        "backpressure_config": BackpressureConfig(
            status_code=503, retry_after_s=float(server.retry_after)
        ),
    }
