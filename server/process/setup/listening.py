"""Where the server listens: a port or a Unix socket, with or without TLS."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
from pathlib import Path

from configs.files import check_regular
from configs.schema import ServerConfig


def check_tls(config: ServerConfig) -> None:
    """ValueError, naming the files, if they hold no certificate and its key."""
    files = f"server.tls_certificate {config.tls_certificate}, server.tls_key {config.tls_key}"
    if config.tls_certificate is None or config.tls_key is None:
        if config.tls_certificate is not config.tls_key:
            raise ValueError(f"{files}: set both, or none of them")
        return
    try:
        for path in (config.tls_certificate, config.tls_key):
            check_regular(path)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            config.tls_certificate, config.tls_key, password=""
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{files}: {error}") from error


def open_listener(config: ServerConfig) -> socket.socket:
    """A socket that listens where the configuration says. OSError, naming the place, when it cannot
    be opened."""
    if config.socket is None:
        return open_port(config.host, config.port)
    return open_unix_socket(config.socket)


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket. OSError, naming the address, when it cannot be opened."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = f"{host}:{port} (server.host, server.port)"
    return _listening(family, (host, port), place)


def open_unix_socket(path: Path) -> socket.socket:
    """A listening Unix socket; one that nobody listens on any more is replaced."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
            path.unlink()
    return _listening(socket.AF_UNIX, str(path), f"{path} (server.socket)")


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def _listening(family: int, address: tuple[str, int] | str, place: str) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"cannot listen on {place}: {reason}") from error
    return listener


def address_of(config: ServerConfig, listener: socket.socket) -> str:
    """The URL by which clients reach the server."""
    scheme = "http" if config.tls_certificate is None else "https"
    if config.socket is not None:
        return f"{scheme}+unix://{config.socket}{config.root_path}"
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{port}{config.root_path}"
