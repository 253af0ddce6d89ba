"""Start a whole local cluster, stop it, restart one process: what `up`, `down` and `restart` do.

Programs (tests, the bench) use `bring_up` and `take_down` as the command does.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from boreal import cluster
from boreal.cluster import CONTROL, ENDPOINTS, ClusterConfig
from boreal.command.certify import certify
from boreal.command.remote import connect, if_reachable
from boreal.command.reporter import Reporter, Silent
from boreal.command.roster import command_line, is_instance, listed, storage_names
from boreal.command.settle import UpOptions, settle_config
from boreal.command.starting import Start
from boreal.processes import LocalProcesses


def bring_up(options: UpOptions, reporter: Reporter | None = None) -> ClusterConfig:
    """Start whatever of the cluster does not run, and return when it serves SQL. Idempotent."""
    reporter = reporter or Silent()
    cluster.prepare_directory(options.data_dir)
    processes = LocalProcesses(options.data_dir)
    with processes.one_command_at_a_time():
        config = settle_config(options, processes, reporter)
        certify(config)
        Start(config, processes, reporter).run()
    return config


def take_down(data_dir: Path, reporter: Reporter | None = None) -> None:
    """Stop everything. Idempotent.

    The control plane goes first: it must not take the end of the writer for a failure and appoint
    another one. The writer takes its last bundle, so storage goes last.
    """
    reporter = reporter or Silent()
    processes = LocalProcesses(data_dir)
    if not data_dir.is_dir():
        return
    with processes.one_command_at_a_time():
        present = processes.names()
        instances = sorted(filter(is_instance, present), key=lambda name: (len(name), name))
        for group in ((CONTROL, ENDPOINTS), instances, storage_names()):
            names = [name for name in group if name in present]
            if not names:
                continue
            began = time.monotonic()
            killed = processes.stop(*names)
            reporter.phase(f"stopped {listed(names)}", time.monotonic() - began)
            if killed:
                reporter.notice(f"{listed(killed)} did not stop in time and had to be killed")


def restart(config: ClusterConfig, name: str, reporter: Reporter | None = None) -> int:
    """Stop process `name` if it runs, start it, and return its pid once it does its work.

    An instance does when it takes clients, in whatever role; and if it was the writer, when there
    is one again, which may be another instance.
    """
    reporter = reporter or Silent()
    began = time.monotonic()
    processes = LocalProcesses(config.data_dir)
    certify(config)
    writes = is_instance(name) and asyncio.run(_wrote_last(config, name))
    pid = processes.restart(name, command_line(config, name))
    asyncio.run(Start(config, processes, reporter).await_one(name, pid, writes=writes))
    reporter.phase(f"{name} is at work again, pid {pid}", time.monotonic() - began)
    return pid


async def _wrote_last(config: ClusterConfig, name: str) -> bool:
    async with connect(config) as remote:
        status = await if_reachable(remote.cluster_status())
    return len(config.compute) == 1 or (status is not None and status.writer == name)
