"""The directory all data of a run are in, and the end of everything in it."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from boreal import process_tree
from boreal.errors import BadUsage

_IN_MEMORY = ("tmpfs", "ramfs")
_PATIENCE_S = 10.0


def filesystem(path: Path) -> str:
    """The type of the filesystem that holds `path`."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    path = path.resolve()
    for parent in (path, *path.parents):
        if parent in mounts:
            return mounts[parent]
    return "unknown"


def require_disk(path: Path) -> None:
    """BadUsage if `path` is in memory: fsync would cost nothing, and the figures mean nothing."""
    found = filesystem(path)
    if found in _IN_MEMORY:
        raise BadUsage(f"{path} is a {found}, where fsync is free. Use --dir with a real disk")


@contextlib.contextmanager
def make_workspace(parent: Path) -> Iterator[Path]:
    """A fresh directory; afterwards neither it nor any process that works in it exists."""
    workspace = Path(tempfile.mkdtemp(prefix="boreal-bench-", dir=parent.resolve()))
    workspace.chmod(0o711)  # the account PostgreSQL runs as has to get through
    try:
        yield workspace
    finally:
        _end_processes_in(workspace)
        shutil.rmtree(workspace)


def _end_processes_in(directory: Path) -> None:
    # The systems have been stopped. This is for what an interrupted set-up leaves: initdb's
    # children do not end with initdb, and are not ours to wait for.
    left = [process for process in psutil.process_iter() if _works_in(process, directory)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in left:
            process_tree.send(process, number)
        _, left = psutil.wait_procs(left, timeout=_PATIENCE_S)


def _works_in(process: psutil.Process, directory: Path) -> bool:
    try:
        return Path(process.cwd()).is_relative_to(directory)
    except (psutil.Error, FileNotFoundError):
        return False
