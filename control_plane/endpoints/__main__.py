"""`python -m control_plane.endpoints`: the process of the writer's and the readers' endpoint."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import click
import structlog
import uvloop

from boreal import logs
from boreal.cluster import ENDPOINTS, ENVIRONMENT_PREFIX
from boreal.errors import BadUsage, BorealError
from boreal.metrics import served
from boreal.rpc.edge import listen as listen_grpc
from boreal.rpc.edge import make_server
from boreal.rpc.health import add_health
from boreal.rpc.identity import Identity
from boreal.rpc.options import identity_options, take_identity
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
    identity: Identity | None,
    *,
    health_port: int | None = None,
    metrics_port: int | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    with ExitStack() as opened:
        listeners = {
            endpoint: opened.enter_context(_listen(host, port)) for endpoint, port in ports.items()
        }
        endpoints = Endpoints(limits, identity.public_context() if identity else None)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, endpoints.stop)
        metrics = served(
            host,
            metrics_port,
            lambda: endpoint_metrics(endpoints),
            about={"component": "endpoints", "name": ENDPOINTS},
        )
        async with metrics, asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watch(control, endpoints.take_over))
            async with _health(host, health_port, endpoints):
                _log.info("endpoints serve", host=host, **{r.value: ports[r] for r in Endpoint})
                await endpoints.run(listeners)
            watching.cancel()
    _log.info("endpoints stopped")


@asynccontextmanager
async def _health(host: str, port: int | None, endpoints: Endpoints) -> AsyncIterator[None]:
    """Answer probes on that port meanwhile, if there is one."""
    if port is None:
        yield
        return
    server = make_server()
    add_health(server, lambda: endpoints.routed)
    listen_grpc(server, f"{host}:{port}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


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


@click.command(context_settings={"auto_envvar_prefix": ENVIRONMENT_PREFIX})
@click.option("--control", required=True, metavar="HOST:PORT", help="The control plane.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--writer-port", required=True, type=_PORT, help="Leads to the writer.")
@click.option("--reader-port", required=True, type=_PORT, help="Leads to each reader in turn.")
@click.option("--health-port", type=_PORT, help="Of the gRPC health service.  [default: none]")
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
@identity_options
def main(
    control: str,
    host: str,
    writer_port: int,
    reader_port: int,
    health_port: int | None,
    metrics_port: int | None,
    patience: float,
    max_waiting: int,
    tls_dir: Path | None,
    insecure: bool,
) -> None:
    """Run a cluster's endpoints: two ports that lead to whoever writes and reads."""
    logs.configure("endpoints")
    _allow_descriptors()
    ports = {Endpoint.WRITER: writer_port, Endpoint.READER: reader_port}
    limits = Limits(patience_s=patience, connections=max_waiting)
    try:
        identity = take_identity(tls_dir, insecure=insecure)
        serving = serve(
            control,
            host,
            ports,
            limits,
            identity,
            health_port=health_port,
            metrics_port=metrics_port,
        )
        uvloop.run(serving)
    except BorealError as error:
        _log.error("endpoints cannot run", code=error.code, why=error.message)
        sys.exit(1)


if __name__ == "__main__":
    main()
