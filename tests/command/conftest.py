"""A cluster directory for the tests of the command."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from boreal import cluster
from boreal.command.lifecycle import take_down


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that an unprivileged PostgreSQL could reach, which pytest's own is not."""
    path = Path(tempfile.mkdtemp(prefix="boreal-command-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    take_down(path)
    shutil.rmtree(path)


@pytest.fixture
def config(directory: Path) -> cluster.ClusterConfig:
    """A cluster of which nothing was ever started."""
    (port,) = cluster.free_ports(1)
    # What the tests put in the place of its processes has no certificates.
    config = replace(cluster.create(directory, postgres_port=port), insecure=True)
    config.save()
    return config
