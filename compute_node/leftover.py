"""Ending what a former life of this compute node left running."""

from __future__ import annotations

import asyncio
import ctypes
from pathlib import Path

import psutil
import structlog

from boreal.errors import ProcessFailed

_GONE_WITHIN_S = 10.0
_ATTEMPTS = 5
_IPC_RMID = 0
_NAME = "postgres"
_DELETED = " (deleted)"
"""What the kernel puts behind the path of what was removed (proc(5))."""

_log = structlog.get_logger(__name__)


async def end_leftover(pgdata: Path) -> None:
    """End every process of PostgreSQL that works in `pgdata`, and remove what it held.

    On return none is left: the proof that nobody writes, and nobody answers a client, on behalf of
    a former life. A postmaster that was killed does not take its backends along: they go on until
    they next wait for something. ProcessFailed if one cannot be ended.
    """
    for _ in range(_ATTEMPTS):
        family = await asyncio.to_thread(_working_in, pgdata)
        if not family:
            _remove_shared_memory(pgdata)
            return
        _log.info("ending what is left of a PostgreSQL", pids=[each.pid for each in family])
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        await asyncio.to_thread(psutil.wait_procs, family, timeout=_GONE_WITHIN_S)
    raise ProcessFailed(f"processes of a former PostgreSQL in {pgdata} do not end")


def _working_in(pgdata: Path) -> list[psutil.Process]:
    """All of them stay in the data directory (ChangeToDataDir, utils/init/miscinit.c)."""
    found = []
    home = str(pgdata.resolve())
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            where = str((entry / "cwd").readlink()).removesuffix(_DELETED)
            if where != home or (entry / "exe").readlink().name.removesuffix(_DELETED) != _NAME:
                continue
            process = psutil.Process(int(entry.name))
        except (OSError, psutil.NoSuchProcess):  # ended meanwhile, or a stranger's
            continue
        found.append(process)
    return found


def _remove_shared_memory(pgdata: Path) -> None:
    """Remove the System V segment of a postmaster that was killed.

    PostgreSQL would find it again by its data directory's inode, and that is new at every start
    here. Columns of /proc/sysvipc/shm, see proc(5): key shmid perms size cpid lpid nattch ...
    """
    try:
        postmaster = (pgdata / "postmaster.pid").read_text().split(maxsplit=1)[0]
    except (FileNotFoundError, IndexError):
        return
    for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]:
        words = line.split()
        identifier, creator, attached = words[1], words[4], words[6]
        if creator == postmaster and attached == "0":
            ctypes.CDLL(None, use_errno=True).shmctl(int(identifier), _IPC_RMID, None)
