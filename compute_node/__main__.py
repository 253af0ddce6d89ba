"""`python -m compute_node`: one compute node's agent."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import click
import structlog
import uvloop

from boreal import logs
from boreal.cluster import ENVIRONMENT_PREFIX
from boreal.engine import find_engine
from boreal.errors import BorealError
from boreal.metrics import served
from boreal.rpc import compute_pb2_grpc
from boreal.rpc.edge import listen, make_server
from boreal.rpc.health import add_health
from boreal.rpc.options import identity_options, take_identity
from boreal.types import InstanceName
from compute_node import shim
from compute_node.agent import Agent
from compute_node.config import ComputeConfig
from compute_node.metrics import agent_metrics, local_metrics
from compute_node.service import ComputeService

_log = structlog.get_logger(__name__)


async def serve(config: ComputeConfig) -> None:
    """Run the agent until SIGTERM or SIGINT."""
    config.data_dir.mkdir(parents=True, exist_ok=True)
    config.engine_dir.mkdir(parents=True, exist_ok=True)
    engine = find_engine(config.engine_dir)
    agent = Agent(config, engine, shim.build(config.engine_dir))
    server = make_server()
    compute_pb2_grpc.add_ComputeServicer_to_server(ComputeService(agent), server)
    add_health(server, lambda: agent.takes_clients)
    listen(server, f"{config.host}:{config.port}")
    await server.start()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.request_stop)
    metrics = served(
        config.host,
        config.metrics_port,
        lambda: agent_metrics(config, agent),
        about={"component": "compute", "name": config.name},
        aside=lambda: local_metrics(config),
    )
    try:
        async with metrics:
            await agent.run()
    finally:
        await server.stop(grace=1)


@click.command(context_settings={"auto_envvar_prefix": ENVIRONMENT_PREFIX})
@click.option("--name", required=True, help="This instance: db-1, ...")
@click.option("--data-dir", required=True, type=click.Path(path_type=Path))
@click.option("--control", required=True, help="HOST:PORT of the control plane.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--advertise", metavar="HOST", help="How others reach this node.  [default: --host]")
@click.option("--port", required=True, type=int, help="Of this agent's gRPC service.")
@click.option("--postgres-port", required=True, type=int)
@click.option("--metrics-port", type=click.IntRange(1, 65535), help="HTTP: Prometheus metrics.")
@click.option(
    "--tier",
    type=click.IntRange(0, 15),
    default=1,
    show_default=True,
    help="Failover priority; 0 comes first.",
)
@click.option(
    "--password-file",
    required=True,
    type=click.Path(path_type=Path, exists=True),
    help="Holds the master user's password; used when the volume is created.",
)
@click.option(
    "--engine-dir",
    type=click.Path(path_type=Path),
    help="Where the page shim is built, and PostgreSQL copied if it must be; compute nodes may "
    "share one.  [default: engine in --data-dir]",
)
@click.option(
    "--handover-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="A directory that the endpoints see under the same path: they hand connections over by a "
    "socket in NAME there.  [default: one within --data-dir]",
)
@click.option(
    "--no-handover", is_flag=True, help="The endpoints are elsewhere: they relay what clients say."
)
@click.option("--cache-size", type=int, default=0, help="Bytes of pages to keep; 0: no bound.")
@click.option("--setting", multiple=True, metavar="NAME=VALUE", help="Further PostgreSQL settings.")
@identity_options
def main(
    name: str,
    data_dir: Path,
    control: str,
    host: str,
    advertise: str | None,
    port: int,
    postgres_port: int,
    metrics_port: int | None,
    tier: int,
    password_file: Path,
    engine_dir: Path | None,
    handover_dir: Path | None,
    no_handover: bool,
    cache_size: int,
    setting: tuple[str, ...],
    tls_dir: Path | None,
    insecure: bool,
) -> None:
    """Run one compute node: a PostgreSQL on a Boreal volume."""
    logs.configure(name)
    pairs = [item.partition("=") for item in setting]
    config = ComputeConfig(
        name=InstanceName(name),
        data_dir=data_dir.absolute(),
        engine_dir=(engine_dir or data_dir / "engine").absolute(),
        host=host,
        advertise=advertise,
        control=control,
        port=port,
        postgres_port=postgres_port,
        metrics_port=metrics_port,
        tier=tier,
        master_password=password_file.read_text().strip(),
        cache_bytes=cache_size,
        takes_handovers=not no_handover,
        shared_handover_dir=handover_dir.absolute() if handover_dir else None,
        settings=tuple((key, value) for key, _, value in pairs),
        tls_dir=tls_dir.absolute() if tls_dir else None,
    )
    try:
        take_identity(config.tls_dir, insecure=insecure)
        uvloop.run(serve(config))
    except BorealError as error:
        _log.error("compute node cannot run", code=error.code, why=error.message)
        sys.exit(1)


if __name__ == "__main__":
    main()
