"""`python -m control_plane`: the control plane's process."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import structlog
import uvloop

from boreal import logs
from boreal.cluster import CONTROL, ENVIRONMENT_PREFIX
from boreal.errors import BorealError
from boreal.metrics import served
from boreal.processes import LocalProcesses
from boreal.rpc import control_pb2_grpc
from boreal.rpc.edge import listen, make_server
from boreal.rpc.health import add_health
from boreal.rpc.options import identity_options, take_identity
from boreal.types import VolumeId
from control_plane.coordinator import Coordinator
from control_plane.launcher import ClusterNames, Launcher
from control_plane.metrics import ClusterMetrics
from control_plane.presence import AttentiveClock
from control_plane.pulse import Pulse
from control_plane.service import ControlService
from control_plane.state import ControlState

_GRACE_S = 0.5

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """What the process was told."""

    data_dir: Path
    host: str
    port: int
    launch: Path | None
    """The local cluster whose dead processes are brought back; None: nobody's."""
    metrics_port: int | None = None
    """HTTP: metrics; None: they are not served."""


def new_volume_id() -> VolumeId:
    """A name no other volume has."""
    return VolumeId(f"vol-{secrets.token_hex(6)}")


async def serve(config: ControlConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    config.data_dir.mkdir(parents=True, exist_ok=True)
    state = ControlState.open(config.data_dir / "control.db")
    try:
        pulse = Pulse()
        clock = AttentiveClock(time.monotonic)
        coordinator = Coordinator(state, clock, new_volume_id, on_change=pulse.beat)
        service = ControlService(coordinator, pulse)
        server = make_server()
        control_pb2_grpc.add_ControlServicer_to_server(service, server)
        add_health(server)
        address = f"{config.host}:{config.port}"
        listen(server, address)
        await server.start()
        _log.info("control plane serves", address=address)
        launcher = _launcher(config.launch)
        collected = ClusterMetrics(service.status, state, launcher)
        metrics = served(
            config.host,
            config.metrics_port,
            collected.collect,
            about={"component": "control", "name": CONTROL},
        )
        async with metrics, asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(service.keep_watch())
            launching = tasks.create_task(_launch(launcher))
            await stopping.wait()
            launching.cancel()
            watching.cancel()
            await server.stop(_GRACE_S)
        _log.info("control plane stopped")
    finally:
        state.close()


def _launcher(cluster_dir: Path | None) -> Launcher | None:
    if cluster_dir is None:
        return None
    return Launcher(LocalProcesses(cluster_dir), ClusterNames(cluster_dir), time.monotonic)


async def _launch(launcher: Launcher | None) -> None:
    if launcher is not None:
        await launcher.run()


@click.command(context_settings={"auto_envvar_prefix": ENVIRONMENT_PREFIX})
@click.option(
    "--data-dir",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the state is kept.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", required=True, type=click.IntRange(1, 65535), help="Of the service.")
@click.option("--metrics-port", type=click.IntRange(1, 65535), help="HTTP: Prometheus metrics.")
@click.option(
    "--launch",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="CLUSTER_DIR",
    help="Start dead compute nodes and endpoints of this local cluster again.",
)
@identity_options
def main(
    data_dir: Path,
    host: str,
    port: int,
    metrics_port: int | None,
    launch: Path | None,
    tls_dir: Path | None,
    insecure: bool,
) -> None:
    """Run a cluster's control plane."""
    logs.configure("control")
    try:
        take_identity(tls_dir, insecure=insecure)
        config = ControlConfig(
            data_dir=data_dir, host=host, port=port, launch=launch, metrics_port=metrics_port
        )
        uvloop.run(serve(config))
    except BorealError as error:
        _log.error("control plane cannot run", error=error.message)
        sys.exit(1)


if __name__ == "__main__":
    main()
