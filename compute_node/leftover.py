"""Ending what a former life of this compute node left running."""

from __future__ import annotations

import asyncio
import ctypes
import time
from contextlib import suppress
from pathlib import Path

import psutil
import structlog

from boreal.errors import ProcessFailed

_GONE_WITHIN_S = 10.0
_LOOK_S = 0.01
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
    deadline = time.monotonic() + _GONE_WITHIN_S
    while family := await asyncio.to_thread(_working_in, pgdata):
        if time.monotonic() > deadline:
            raise ProcessFailed(f"processes of a former PostgreSQL in {pgdata} do not end")
        _log.info("ending what is left of a PostgreSQL", pids=[each.pid for each in family])
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        # Not waited for one by one: what its parent does not reap would never be gone.
        await asyncio.sleep(_LOOK_S)
    _remove_shared_memory(pgdata)


def _working_in(pgdata: Path) -> list[psutil.Process]:
    """All of them stay in the data directory (ChangeToDataDir, utils/init/miscinit.c).

    Without those that have ended and are only not reaped yet.
    """
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
