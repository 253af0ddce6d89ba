"""Tests of the compute node run on the event loop its process runs on. What the shim's share."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import uvloop

from compute_node import shim
from tests.compute_node.shim_driver import Driver, build_fake_engine
from tests.compute_node.shim_volume import stopped_original
from tests.compute_node.shimmed import Original


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """uvloop alone."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def volume() -> Iterator[tuple[Original, list[Any]]]:
    """A stopped stock cluster of many kinds of relation, and what it answered."""
    with stopped_original() as made:
        yield made


@pytest.fixture(scope="session")
def original(volume: tuple[Original, list[Any]]) -> Original:
    """The cluster alone."""
    return volume[0]


@pytest.fixture(scope="session")
def library(original: Original) -> Path:
    """The shim, where PostgreSQL's account reaches it."""
    return shim.build(original.home / "shim")


@pytest.fixture(scope="session")
def fake_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes a program look like PostgreSQL to the shim."""
    return build_fake_engine(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def driver(library: Path, fake_engine: Path) -> Iterator[Driver]:
    """A program that looks so."""
    # Not tmp_path: a unix socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="boreal-shim-") as folder:
        yield Driver(Path(folder), [library, fake_engine])
