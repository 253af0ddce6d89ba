"""Goal: a data directory goes into a bundle and comes out the same, with sparse relation files of
the right length beside it; and a bundle can write nowhere else.

Method: small data directories, stored on and restored from storage nodes in this process, behind
real gRPC. (That PostgreSQL starts from one is shown in tests/cluster.)
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from boreal.engine import Account, Engine
from boreal.errors import CorruptData, QuorumUnavailable
from boreal.types import (
    PAGE_BYTES,
    RELATION_SEGMENT_BLOCKS,
    Epoch,
    Fork,
    Lsn,
    RelationFork,
    Timeline,
    VolumeId,
)
from compute_node.bundle import Bundle, CollectedFile, collect_files, restore
from compute_node.fleet import DEFAULT_LIMITS, Fleet
from compute_node.read_path import Patience
from compute_node.storage_client import BundleFile, BundleManifest
from tests.compute_node.fleet_node import LOG_START, FleetNode, running

LIMITS = replace(DEFAULT_LIMITS, bulk=Patience(attempt_s=2.0, total_s=0.5))
ENGINE = Engine(home=Path("/nowhere"), account=Account.current())
PAGE = b"\x5a" * PAGE_BYTES
HEAP = RelationFork(1663, 5, 16384, Fork.MAIN)
REDO, END = Lsn(LOG_START + 100), Lsn(LOG_START + 500)

FILES: Mapping[str, bytes] = {
    "PG_VERSION": b"16\n",
    "global/pg_control": bytes(range(256)) * 32,
    "global/pg_filenode.map": b"map" * 170,
    "base/5/PG_VERSION": b"16\n",
    "base/5/16384_fsm": PAGE * 3,
    "pg_xact/0000": bytes(8192),
    "pg_multixact/members/0000": b"",
}


def lay_out(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
        (path / name).chmod(0o600)
    for directory in (path, *(p for p in path.rglob("*") if p.is_dir())):
        directory.chmod(0o700)
    return path


def read_back(path: Path) -> dict[str, bytes]:
    files = (p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def all_below(path: Path) -> list[Path]:
    return sorted(path.rglob("*"))


def bundle_of(path: Path) -> Bundle:
    return Bundle(redo=REDO, end=END, timeline=Timeline(2), files=tuple(collect_files(path)))


def manifest_of(*files: BundleFile) -> BundleManifest:
    return BundleManifest(
        redo=REDO, end=END, timeline=Timeline(1), epoch=Epoch(1), taken_at="now", files=files
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return lay_out(tmp_path / "source", FILES)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir(mode=0o700)
    return path


@asynccontextmanager
async def six() -> AsyncIterator[tuple[Fleet, list[FleetNode]]]:
    nodes = [FleetNode(f"sn-{number}") for number in range(1, 7)]
    fleet = Fleet(VolumeId("v"), Epoch(1), limits=LIMITS)
    try:
        async with running(*nodes) as members:
            await fleet.set_members(members)
            yield fleet, nodes
    finally:
        await fleet.close()


# --- there and back -----------------------------------------------------------------------------


async def test_a_directory_comes_back_as_it_was(source: Path, target: Path) -> None:
    async with six() as (fleet, _nodes):
        await bundle_of(source).store(fleet)
        manifest = await fleet.latest_bundle()
        restored = await restore(manifest, fleet, target, ENGINE)
    assert read_back(target) == {**FILES, "standby.signal": b""}
    assert restored.bytes_written == sum(map(len, FILES.values()))
    assert (manifest.redo, manifest.end, manifest.timeline) == (REDO, END, 2)
    assert manifest.epoch == fleet.epoch


async def test_modes_and_empty_directories_come_back(source: Path, target: Path) -> None:
    (source / "pg_wal" / "archive_status").mkdir(parents=True)
    (source / "pg_wal" / "000000010000000000000001").write_bytes(b"log")
    (source / "pg_wal").chmod(0o700)
    (source / "PG_VERSION").chmod(0o640)
    async with six() as (fleet, _nodes):
        await bundle_of(source).store(fleet)
        await restore(await fleet.latest_bundle(), fleet, target, ENGINE)
    assert list((target / "pg_wal").iterdir()) == []
    modes = {p: (target / p).stat().st_mode & 0o777 for p in ("PG_VERSION", "base/5", "pg_wal")}
    assert modes == {"PG_VERSION": 0o640, "base/5": 0o700, "pg_wal": 0o700}


async def test_equal_contents_are_sent_once_and_known_ones_not_again(source: Path) -> None:
    distinct = set(FILES.values())
    async with six() as (fleet, _nodes):
        put = await bundle_of(source).store(fleet)
        assert put.files_sent == len(distinct) * len(put.nodes)
        assert put.bytes_sent == sum(map(len, distinct)) * len(put.nodes)
        (source / "pg_xact" / "0000").write_bytes(b"changed")
        again = await bundle_of(source).store(fleet)
        # A node the first one did not wait for may still have been at it.
        assert again.bytes_sent >= len(b"changed") * len(again.nodes)
        assert again.files_sent < put.files_sent


async def test_pages_never_go_into_a_bundle(source: Path) -> None:
    lay_out(source, {"base/5/16384": PAGE, "base/5/16384_vm": PAGE, "global/1262": PAGE})
    assert {file.path for file in collect_files(source) if file.content is not None} == set(FILES)


def test_a_file_that_vanishes_is_passed_over(source: Path) -> None:
    collected = []
    for file in collect_files(source):
        collected.append(file.path)
        (source / "global" / "pg_filenode.map").unlink(missing_ok=True)
    assert set(FILES) - set(collected) == {"global/pg_filenode.map"}


# --- sparse files -------------------------------------------------------------------------------


async def test_relation_files_are_sparse_and_of_the_right_length(
    source: Path, target: Path
) -> None:
    blocks = RELATION_SEGMENT_BLOCKS + 7
    relations = {
        HEAP: blocks,
        HEAP._replace(fork=Fork.VM): 3,
        HEAP._replace(relation=16390): 0,
        RelationFork(1664, 0, 1262, Fork.MAIN): 1,
    }
    async with six() as (fleet, nodes):
        await bundle_of(source).store(fleet)
        for node in nodes:
            node.pages = {fork: [PAGE] * count for fork, count in relations.items()}
        await restore(await fleet.latest_bundle(), fleet, target, ENGINE)
    lengths = {
        "base/5/16384": RELATION_SEGMENT_BLOCKS * PAGE_BYTES,
        "base/5/16384.1": 7 * PAGE_BYTES,
        "base/5/16384_vm": 3 * PAGE_BYTES,
        "base/5/16390": 0,
        "global/1262": PAGE_BYTES,
    }
    for name, length in lengths.items():
        status = (target / name).stat()
        assert (name, status.st_size, status.st_blocks) == (name, length, 0)
        assert status.st_mode & 0o777 == 0o600


async def test_a_free_space_map_is_the_bundles_not_storages(source: Path, target: Path) -> None:
    async with six() as (fleet, nodes):
        await bundle_of(source).store(fleet)
        for node in nodes:
            node.pages = {HEAP._replace(fork=Fork.FSM): [PAGE] * 9}
        await restore(await fleet.latest_bundle(), fleet, target, ENGINE)
    assert (target / "base/5/16384_fsm").read_bytes() == FILES["base/5/16384_fsm"]


async def test_relations_of_a_database_that_is_gone_are_left_out(
    source: Path, target: Path
) -> None:
    async with six() as (fleet, nodes):
        await bundle_of(source).store(fleet)
        for node in nodes:
            node.pages = {HEAP._replace(database=99): [PAGE]}
        await restore(await fleet.latest_bundle(), fleet, target, ENGINE)
    assert not (target / "base" / "99").exists()


# --- what a bundle cannot do --------------------------------------------------------------------


@pytest.mark.parametrize("is_directory", [False, True], ids=["file", "directory"])
@pytest.mark.parametrize("path", ["../evil", "base/../../evil", "{outside}/evil", "link/evil"])
async def test_nothing_is_written_outside_of_pgdata(
    tmp_path: Path, target: Path, path: str, *, is_directory: bool
) -> None:
    (tmp_path / "outside").mkdir()
    (target / "base").mkdir()
    (target / "link").symlink_to(tmp_path / "outside")
    before = all_below(tmp_path)
    content = b"content"
    digest = b"" if is_directory else hashlib.sha256(content).digest()
    file = BundleFile(
        path=path.format(outside=tmp_path / "outside"),
        sha256=digest,
        size_bytes=0 if is_directory else len(content),
        mode=0o700,
    )
    async with six() as (fleet, nodes):
        for node in nodes:
            node.contents[hashlib.sha256(content).digest()] = content
        with pytest.raises(CorruptData, match="outside PGDATA"):
            await restore(manifest_of(file), fleet, target, ENGINE)
    assert all_below(tmp_path) == before


async def test_a_content_that_one_node_lost_comes_from_another(target: Path) -> None:
    held, lost = b"held", b"lost"
    files = [
        BundleFile(path=name, sha256=hashlib.sha256(content).digest(), size_bytes=4, mode=0o600)
        for name, content in (("held", held), ("lost", lost))
    ]
    async with six() as (fleet, nodes):
        for node in nodes:
            node.contents[files[0].sha256] = held
            node.contents[files[1].sha256] = lost
        nodes[0].contents[files[1].sha256] = b"rot "
        del nodes[1].contents[files[1].sha256]
        await restore(manifest_of(*files), fleet, target, ENGINE)
    assert read_back(target) == {"held": held, "lost": lost, "standby.signal": b""}


async def test_nothing_is_laid_out_unless_every_content_came(target: Path) -> None:
    files = [
        BundleFile(path=name, sha256=hashlib.sha256(content).digest(), size_bytes=4, mode=0o600)
        for name, content in (("held", b"held"), ("lost", b"lost"))
    ]
    async with six() as (fleet, nodes):
        for node in nodes:
            node.contents[files[0].sha256] = b"held"
        # A task group gives its own kind of error; the instance takes the first out of it.
        with pytest.raises(ExceptionGroup) as raised:
            await restore(manifest_of(*files), fleet, target, ENGINE)
    assert raised.group_contains(QuorumUnavailable)
    assert read_back(target) == {}


def test_an_empty_file_is_a_file_and_a_directory_is_none(source: Path) -> None:
    by_path = {file.path: file for file in collect_files(source)}
    assert by_path["pg_multixact/members/0000"] == CollectedFile(
        path="pg_multixact/members/0000", content=b"", mode=0o600
    )
    assert by_path["pg_multixact/members"].content is None
