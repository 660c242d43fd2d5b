"""Deploys the application to a Ray cluster, or to one that ends with this process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from urllib.parse import urlsplit

import ray
from ray import serve

from configs.schema import Config, ServerConfig
from server.process.setup.listening import address_of, check_tls, open_listener
from server.process.setup.logs import set_up_logging
from server.process.supervision.process_table import children_of
from server.ray.app import QUIET, application, cluster_gpus

NAME = "aerie"
START_TRIES = 3  # of Ray on this machine
LEAVING_TIME = 60.0  # seconds for processes to end once their requests have
LEAVING_POLL = 0.2  # seconds between looks whether they have

logger = logging.getLogger(__name__)


def deploy(config: Config, address: str | None) -> int:
    """Run the application; returns the exit code.

    Without an `address`, a cluster on this machine is started, and this returns after SIGTERM or
    SIGINT, when open requests have ended. Else the application goes to the cluster there, stays
    there, and this returns when it is ready.

    Raises:
        ValueError: a setting has no meaning for Ray's HTTP server.
        OSError: the port cannot be used.
        ConnectionError: there is no cluster at `address`.
        RuntimeError: Ray or the engines cannot start.
        TimeoutError: processes of the application do not end.
    """
    check_server(config.server, in_cluster=address is not None)
    check_tls(config.server)
    set_up_logging(config.log)
    connect(address)
    stop = _stop_signals()  # Ray has handlers of its own, which end the process at once
    try:
        url = own_url(config.server) if address is None else cluster_url(config.server)
        start(config, url)
        sys.stdout.write(f"READY {url}  (OpenAI base URL: {url}/v1)\n")
        sys.stdout.flush()
        if address is None:
            stop.wait()
            logger.info("draining")
            delete(config.server.drain_timeout + LEAVING_TIME)
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()
    return 0


def connect(address: str | None) -> None:
    """Join the cluster at `address`, or start one on this machine. Ray gives its processes 30 s to
    start, which a busy machine may exceed, so there are several tries. RuntimeError after the last.
    """
    for number in range(1, START_TRIES + 1):
        try:
            ray.init(address=address or "local", include_dashboard=False, log_to_driver=True)
        except Exception as error:  # what Ray raises then has no type of its own
            if address is not None or type(error) is not Exception:
                raise
            logger.warning("Ray did not start, try %d of %d: %s", number, START_TRIES, error)
            end_children()
        else:
            return
    raise RuntimeError(f"Ray did not start on this machine in {START_TRIES} tries")


def end_children() -> None:
    """End what a start of Ray has left: this process has no other children."""
    for child in children_of(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def own_url(server: ServerConfig) -> str:
    """Where a cluster of this machine can listen. OSError, which says why, if it cannot."""
    with open_listener(server) as listener:
        return address_of(server, listener)


def cluster_url(server: ServerConfig) -> str:
    """Where the machines of a cluster listen; the application may be there already."""
    scheme = "http" if server.tls_certificate is None else "https"
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"{scheme}://{host}:{server.port}{server.root_path}"


def start(config: Config, url: str) -> None:
    """Start the application in the cluster of this process; returns once it is ready."""
    http = {
        "host": config.server.host,
        "port": urlsplit(url).port,
        "ssl_certfile": _text(config.server.tls_certificate),
        "ssl_keyfile": _text(config.server.tls_key),
    }
    serve.start(proxy_location="EveryNode", http_options=http, logging_config=QUIET)
    front = serve.run(application(config, cluster_gpus()), name=NAME, route_prefix="/")
    front.wait_ready.remote().result()


def delete(within: float) -> None:
    """Let the application drain, and end it. Ray would wait for a minute, whatever drains longer.
    TimeoutError after `within` seconds."""
    end = time.monotonic() + within
    serve.delete(NAME, _blocking=False)
    while NAME in serve.status().applications:
        if time.monotonic() > end:
            raise TimeoutError(f"the application has not ended within {within:.0f} s")
        time.sleep(LEAVING_POLL)


def check_server(server: ServerConfig, *, in_cluster: bool) -> None:
    """ValueError for settings of a server that Ray's HTTP server cannot honour."""
    if server.socket is not None:
        raise ValueError(
            f"server.socket is {str(server.socket)!r}: Ray's HTTP server listens on server.host "
            "and server.port"
        )
    if not server.port and in_cluster:
        raise ValueError("server.port is 0: name the port on which the cluster listens")


def _text(path: object) -> str | None:
    return None if path is None else str(path)


def _stop_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
