"""`python -m storage_node`: a node's log process, which starts its page process."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import structlog
import uvloop

from boreal import logs
from boreal.cluster import ENVIRONMENT_PREFIX
from boreal.errors import BadUsage, BorealError
from boreal.metrics import served
from boreal.rpc import storage_pb2_grpc
from boreal.rpc.edge import listen, make_server
from boreal.rpc.health import add_health
from boreal.rpc.options import identity_options, take_identity
from boreal.types import NodeName
from storage_node.append import AppendHandler
from storage_node.catch_up import CatchUp
from storage_node.config import RETAIN_LOG_BYTES, StorageConfig
from storage_node.heartbeat import Heartbeat, Membership
from storage_node.lane import append_lane
from storage_node.log_service import BundlesService, StorageLogService
from storage_node.metrics import log_metrics
from storage_node.page_supervisor import PageProcess, PageSupervisor
from storage_node.pressure import Pressure
from storage_node.trim import LogTrimmer
from storage_node.volumes import Volumes

_GRACE_SECONDS = 0.5

_log = structlog.get_logger(__name__)


@contextmanager
def only_process_of(data_dir: Path) -> Iterator[None]:
    """Hold the directory; BadUsage if another node's process does."""
    data_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadUsage(
                f"{data_dir} is in use by another storage node; stop it or choose another directory"
            ) from error
        yield
    finally:
        os.close(descriptor)


async def serve(config: StorageConfig, start_pages: Callable[[], PageProcess]) -> None:
    """Run the node until SIGTERM or SIGINT."""
    finished = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, finished.set)
    volumes = Volumes(config)
    membership = Membership()
    pages = PageSupervisor(config.name, start_pages)
    catch_up = CatchUp(volumes, membership, pages.notify)
    appends = AppendHandler(volumes, pages.notify, config.pressure)

    def changed() -> None:
        pages.notify()
        catch_up.wake()

    server = make_server()
    log_service = StorageLogService(config.name, volumes, appends, changed)
    storage_pb2_grpc.add_StorageLogServicer_to_server(log_service, server)
    storage_pb2_grpc.add_BundlesServicer_to_server(BundlesService(volumes), server)
    add_health(server, lambda: pages.running and not volumes.broken)
    lane = append_lane(appends)
    try:
        listen(server, f"{config.host}:{config.log_port}")
        await server.start()
        await lane.start(config.host, config.frames_port)
        metrics = served(
            config.host,
            config.metrics_port,
            lambda: log_metrics(config, volumes, pages),
            about={"component": "storage", "name": config.name, "zone": config.zone},
        )
        async with metrics, asyncio.TaskGroup() as tasks:
            heartbeat = Heartbeat(config, volumes, membership, lambda: pages.running)
            work = (heartbeat, catch_up, pages, LogTrimmer(volumes))
            jobs = [tasks.create_task(job.run()) for job in work]
            _log.info("storage node serves", volumes=[volume for volume, _ in volumes])
            await finished.wait()
            for job in jobs:
                job.cancel()
    finally:
        await lane.stop()
        await server.stop(_GRACE_SECONDS)
        volumes.close()
    _log.info("storage node stopped")


def run(config: StorageConfig, start_pages: Callable[[], PageProcess], *, insecure: bool) -> None:
    """Be the log process of a node; exits with a message if it cannot."""
    logs.configure(config.name)
    try:
        take_identity(config.tls_dir, insecure=insecure)
        with only_process_of(config.data_dir):
            uvloop.run(serve(config, start_pages))
    except BorealError as error:
        _log.error("storage node cannot run", code=error.code, why=error.message)
        sys.exit(1)


@click.command(context_settings={"auto_envvar_prefix": ENVIRONMENT_PREFIX})
@click.option("--name", required=True, help="Its name in the cluster: sn-1, sn-2, ...")
@click.option("--zone", required=True, help="Its availability zone.")
@click.option(
    "--data-dir",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Everything it keeps is in here.",
)
@click.option("--control", required=True, metavar="HOST:PORT", help="The control plane.")
@click.option(
    "--log-port", required=True, type=click.IntRange(1, 65535), help="gRPC: log, bundles."
)
@click.option(
    "--frames-port", required=True, type=click.IntRange(1, 65535), help="Framed lane of appends."
)
@click.option("--pages-port", required=True, type=click.IntRange(1, 65535), help="gRPC: pages.")
@click.option(
    "--page-frames-port",
    required=True,
    type=click.IntRange(1, 65535),
    help="Framed lane of page reads.",
)
@click.option("--metrics-port", type=click.IntRange(1, 65535), help="HTTP: Prometheus metrics.")
@click.option(
    "--pages-metrics-port",
    type=click.IntRange(1, 65535),
    help="HTTP: Prometheus metrics of the page process.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--advertise", metavar="HOST", help="How others reach this node.  [default: --host]")
@click.option(
    "--retain-log-mib",
    default=RETAIN_LOG_BYTES >> 20,
    show_default=True,
    type=click.IntRange(1),
    help="Log a volume keeps below what anybody may still ask for, in MiB.",
)
@click.option(
    "--index-lag-mib",
    default=Pressure().soft_bytes >> 20,
    show_default=True,
    type=click.IntRange(1),
    help="Log that may wait for the page index before the writer is slowed, in MiB.",
)
@identity_options
def main(
    name: str,
    zone: str,
    data_dir: Path,
    control: str,
    log_port: int,
    frames_port: int,
    pages_port: int,
    page_frames_port: int,
    metrics_port: int | None,
    pages_metrics_port: int | None,
    host: str,
    advertise: str | None,
    retain_log_mib: int,
    index_lag_mib: int,
    tls_dir: Path | None,
    insecure: bool,
) -> None:
    """Run a Boreal storage node."""
    from storage_node import page_process

    config = StorageConfig(
        name=NodeName(name),
        zone=zone,
        data_dir=data_dir,
        host=host,
        advertise=advertise,
        control=control,
        log_port=log_port,
        frames_port=frames_port,
        pages_port=pages_port,
        page_frames_port=page_frames_port,
        metrics_port=metrics_port,
        pages_metrics_port=pages_metrics_port,
        retain_log_bytes=retain_log_mib << 20,
        pressure=Pressure(soft_bytes=index_lag_mib << 20),
        tls_dir=tls_dir.absolute() if tls_dir else None,
    )
    run(config, lambda: page_process.start(config), insecure=insecure)


if __name__ == "__main__":
    main()
