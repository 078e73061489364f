"""What commands have in common that listen at an address: a socket, who may call, and the end by Ctrl-C."""

from __future__ import annotations

import importlib
import ipaddress
import logging
import socket
from collections.abc import Callable
from typing import Any

from reknow.cli.terminal import warn
from reknow.errors import InputError, MissingExtra

_PATIENCE = 5
"""Seconds that answers may still take when the server is stopped."""


def need_server(extra: str, purpose: str, *packages: str) -> None:
    """Raises MissingExtra where a package is not installed, before anything is done."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise MissingExtra(package, extra, purpose) from None


def listen(host: str, port: int) -> socket.socket:
    """A socket at the address; InputError where there can be none."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
        return listening
    except OSError as error:
        raise InputError(
            f"expected to listen at {host}, port {port}; got {error.strerror or error}: give another --port or --host"
        ) from None


def loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names(host: str) -> list[str] | None:
    """Names by which a server at this address may be called; None: any."""
    return [host, "localhost", "127.0.0.1", "[::1]"] if loopback(host) else None


def address(listening: socket.socket, host: str) -> str:
    """The address as a browser takes it."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"


def warn_of_others(host: str, what: str, advice: str) -> None:
    """Says where other machines reach the address."""
    if not loopback(host):
        warn(f"{host} can be reached from other machines, from which {what}: {advice}")


def run_server(
    app: Any,
    listening: socket.socket,
    *,
    lifespan: bool = False,
    patience: int = _PATIENCE,
    closing: Callable[[], object] = bool,
) -> None:
    """Answers until Ctrl-C or SIGTERM comes; what is written then may end within so many seconds.

    Args:
        closing: called when it comes, before those seconds.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            closing()
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it tells of each answer that is cut off
            await super().shutdown(sockets)

    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=patience,
        lifespan="on" if lifespan else "off",
    )
    Server(config).run(sockets=[listening])
