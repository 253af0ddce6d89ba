"""Instances come and go, and the writer's role moves: `add-reader`, `remove-reader`, `failover`."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from boreal import cluster
from boreal.cluster import CONTROL, ClusterConfig, InstanceEntry
from boreal.command.certify import certify
from boreal.command.remote import Place, Remote, connect, of_control_plane
from boreal.command.reporter import Reporter, Silent
from boreal.command.roster import command_line
from boreal.command.starting import Start
from boreal.errors import BadUsage, Refused
from boreal.processes import LocalProcesses
from boreal.rpc import control_pb2

_FORGOTTEN_BOUND_S = 5.0
"""How long the control plane may take to notice that an instance we stopped is gone."""
_POLL_S = 0.1


def add_reader(
    data_dir: Path, tier: int, reporter: Reporter | None = None
) -> tuple[ClusterConfig, InstanceEntry]:
    """Add an instance and return when it takes clients; of a cluster that is down, only add it."""
    reporter = reporter or Silent()
    processes = LocalProcesses(data_dir)
    cluster.load(data_dir)  # is there one at all?
    with processes.one_command_at_a_time():
        began = time.monotonic()
        before = cluster.load(data_dir)
        config = cluster.with_instance(before, tier)
        (entry,) = set(config.compute) - set(before.compute)
        config.save()
        certify(config)
        if not processes.status(CONTROL).alive:
            reporter.notice(f"{entry.name} is part of the cluster; `boreal up` will start it")
            return config, entry
        asyncio.run(Start(config, processes, reporter).start_instance(entry.name))
        reporter.phase(f"{entry.name} takes clients", time.monotonic() - began)
    return config, entry


def remove_reader(data_dir: Path, name: str, reporter: Reporter | None = None) -> None:
    """Stop an instance that is not the writer, for good, and delete its files.

    A removal that was interrupted is completed by repeating it.
    """
    reporter = reporter or Silent()
    processes = LocalProcesses(data_dir)
    cluster.load(data_dir)  # is there one at all?
    with processes.one_command_at_a_time():
        began = time.monotonic()
        config = cluster.load(data_dir)
        config.instance(name)
        if len(config.compute) == 1:
            raise BadUsage(f"{name} is the only instance; a cluster without one serves nobody")
        asyncio.run(_remove(config, processes, name))
        if (data_dir / name).exists():
            shutil.rmtree(data_dir / name)
        cluster.without_instance(config, name).save()
        reporter.phase(f"removed {name}", time.monotonic() - began)


async def _remove(config: ClusterConfig, processes: LocalProcesses, name: str) -> None:
    async with connect(config) as remote:
        status = await of_control_plane(remote.cluster_status(), config)
        if status.writer == name:
            raise BadUsage(
                f"{name} is the writer; `boreal failover` makes another instance the writer first"
            )
        await asyncio.to_thread(processes.stop, name)
        try:
            await _forgotten(config, remote, name)
        except Refused:
            # It became the writer at this very moment: it is needed.
            processes.start(name, command_line(config, name))
            raise


async def _forgotten(config: ClusterConfig, remote: Remote, name: str) -> None:
    """Return once the control plane does not know the instance, which it may never have."""
    deadline = time.monotonic() + _FORGOTTEN_BOUND_S
    while True:
        status = await of_control_plane(remote.cluster_status(), config)
        if all(each.status.instance != name for each in status.instances):
            return
        try:
            await of_control_plane(remote.remove_instance(name), config)
        except Refused:
            if status.writer == name or time.monotonic() > deadline:
                raise
            await asyncio.sleep(_POLL_S)
        else:
            return


async def fail_over(place: Place, target: str) -> control_pb2.FailoverResponse:
    """Make `target`, or with none named the reader that is next, the writer."""
    if target and isinstance(place, ClusterConfig):
        place.instance(target)
    async with connect(place) as remote:
        return await of_control_plane(remote.failover(target), place)
