"""What durable files need: names that are synced, whole replacement, "no room" as an error."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from boreal.errors import DiskFull

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def disk_error(error: OSError) -> OSError | DiskFull:
    """What to raise for an OSError of a write: DiskFull if it says that there is no room."""
    if error.errno in _NO_ROOM:
        return DiskFull(f"no room on this node's disk ({error}); nothing was done")
    return error


@contextmanager
def telling_disk_full() -> Iterator[None]:
    """Raise DiskFull for an OSError that says there is no room."""
    try:
        yield
    except OSError as error:
        raise disk_error(error) from error


def sync_directory(path: Path) -> None:
    """Make names that were made, changed or removed in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file's content as a whole; durable on return."""
    scratch = path.with_name(path.name + ".new")
    with telling_disk_full(), scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_directory(path.parent)
