"""`python -m control_plane.endpoints`: the process of the writer's and the readers' endpoint."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
import sys
from contextlib import ExitStack

import click
import structlog
import uvloop

from boreal import logs
from boreal.cluster import ENDPOINTS
from boreal.errors import BadUsage, BorealError
from boreal.metrics import served
from control_plane.endpoints.choice import Endpoint
from control_plane.endpoints.metrics import endpoint_metrics
from control_plane.endpoints.server import Endpoints, Limits, listen
from control_plane.endpoints.watch import watch

_DESCRIPTORS = 20_000
"""What the bounds of `Limits` may come to: a connection and a carrier, each."""

_log = structlog.get_logger(__name__)


async def serve(
    control: str,
    host: str,
    ports: dict[Endpoint, int],
    limits: Limits,
    metrics_port: int | None,
) -> None:
    """Serve until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    with ExitStack() as opened:
        listeners = {
            endpoint: opened.enter_context(_listen(host, port)) for endpoint, port in ports.items()
        }
        endpoints = Endpoints(limits)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, endpoints.stop)
        _log.info("endpoints serve", host=host, **{role.value: ports[role] for role in Endpoint})
        metrics = served(
            host,
            metrics_port,
            lambda: endpoint_metrics(endpoints),
            about={"component": "endpoints", "name": ENDPOINTS},
        )
        async with metrics, asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watch(control, endpoints.take_over))
            await endpoints.run(listeners)
            watching.cancel()
    _log.info("endpoints stopped")


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        raise BadUsage(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def _allow_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


_PORT = click.IntRange(1, 65535)


@click.command()
@click.option("--control", required=True, metavar="HOST:PORT", help="The control plane.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--writer-port", required=True, type=_PORT, help="Leads to the writer.")
@click.option("--reader-port", required=True, type=_PORT, help="Leads to each reader in turn.")
@click.option("--metrics-port", type=_PORT, help="HTTP: Prometheus metrics.")
@click.option(
    "--patience",
    default=Limits().patience_s,
    show_default=True,
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="A connection waits so long for an instance.",
)
@click.option(
    "--max-waiting",
    default=Limits().connections,
    show_default=True,
    type=click.IntRange(1, Limits().connections),
    help="Connections that may wait.",
)
def main(
    control: str,
    host: str,
    writer_port: int,
    reader_port: int,
    metrics_port: int | None,
    patience: float,
    max_waiting: int,
) -> None:
    """Run a cluster's endpoints: two ports that lead to whoever writes and reads."""
    logs.configure("endpoints")
    _allow_descriptors()
    ports = {Endpoint.WRITER: writer_port, Endpoint.READER: reader_port}
    limits = Limits(patience_s=patience, connections=max_waiting)
    try:
        uvloop.run(serve(control, host, ports, limits, metrics_port))
    except BorealError as error:
        _log.error("endpoints cannot run", code=error.code, why=error.message)
        sys.exit(1)


if __name__ == "__main__":
    main()
