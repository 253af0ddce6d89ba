"""Goal: the control file put into a bundle is one that PostgreSQL itself takes for a standby's.

Method: a real control file from `initdb`, changed, and read back by the engine's own
`pg_controldata`, which also checks the checksum; then the same file damaged in each way that must
be noticed.
"""

from __future__ import annotations

import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import pytest

from boreal.engine import Engine, find_engine
from boreal.errors import CorruptData, Internal
from boreal.types import Lsn, format_lsn, parse_lsn
from compute_node import control_file

CONSISTENT = Lsn(0x3_4567_89A8)
CRC_AT = 288


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A data directory nobody has started."""

    engine: Engine
    path: Path
    original: bytes

    def told(self, content: bytes) -> dict[str, str]:
        """What pg_controldata says of `content`, by label."""
        file = self.path / control_file.PATH
        file.write_bytes(content)
        try:
            output = self.engine.run("pg_controldata", str(self.path))
        finally:
            file.write_bytes(self.original)
        assert "WARNING" not in output, output
        return dict(re.findall(r"^([^:\n]+):\s+(.*)$", output, re.MULTILINE))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    home = Path(tempfile.mkdtemp(prefix="boreal-control-", dir="/var/tmp"))
    try:
        home.chmod(0o755)
        engine = find_engine(home / "engine")
        engine.account.own(home)
        path = home / "data"
        engine.run("initdb", f"--pgdata={path}", "--no-sync", "--auth=trust", "--no-instructions")
        original = (path / control_file.PATH).read_bytes()
        yield Cluster(engine=engine, path=path, original=original)
    finally:
        shutil.rmtree(home)


def with_right_checksum(content: bytearray) -> bytes:
    struct.pack_into("<I", content, CRC_AT, google_crc32c.value(bytes(content[:CRC_AT])))
    return bytes(content)


def test_redo_is_what_the_engine_says(cluster: Cluster) -> None:
    told = cluster.told(cluster.original)
    redo, timeline = control_file.redo_of(cluster.original)
    assert redo == parse_lsn(told["Latest checkpoint's REDO location"])
    assert timeline == int(told["Latest checkpoint's TimeLineID"])


def test_the_engine_takes_it_for_a_standby_consistent_from_there(cluster: Cluster) -> None:
    before = cluster.told(cluster.original)
    after = cluster.told(control_file.as_standby(cluster.original, CONSISTENT))
    assert before["Database cluster state"] == "shut down"
    assert {label for label in before if before[label] != after[label]} == {
        "Database cluster state",
        "Minimum recovery ending location",
        "Min recovery ending loc's timeline",
    }
    assert after["Database cluster state"] == "in archive recovery"
    assert after["Minimum recovery ending location"] == format_lsn(CONSISTENT)
    assert after["Min recovery ending loc's timeline"] == before["Latest checkpoint's TimeLineID"]


def test_replay_begins_where_it_did(cluster: Cluster) -> None:
    standby = control_file.as_standby(cluster.original, CONSISTENT)
    assert control_file.redo_of(standby) == control_file.redo_of(cluster.original)
    assert len(standby) == len(cluster.original) == 8192


def test_made_a_standby_twice_it_is_one_of_the_later_lsn(cluster: Cluster) -> None:
    once = control_file.as_standby(cluster.original, Lsn(0x1000))
    assert control_file.as_standby(once, CONSISTENT) == control_file.as_standby(
        cluster.original, CONSISTENT
    )


@pytest.mark.parametrize("at", [0, 16, 40, 48, 136, CRC_AT - 1, CRC_AT, CRC_AT + 3])
def test_a_damaged_byte_is_noticed(cluster: Cluster, at: int) -> None:
    damaged = bytearray(cluster.original)
    damaged[at] ^= 0x01
    with pytest.raises(CorruptData, match="checksum"):
        control_file.redo_of(bytes(damaged))
    with pytest.raises(CorruptData, match="checksum"):
        control_file.as_standby(bytes(damaged), CONSISTENT)


@pytest.mark.parametrize("version", [1201, 1301, 1700])
def test_another_version_is_none_of_ours(cluster: Cluster, version: int) -> None:
    other = bytearray(cluster.original)
    struct.pack_into("<I", other, 8, version)
    content = with_right_checksum(other)
    with pytest.raises(Internal, match=str(version)):
        control_file.redo_of(content)
    with pytest.raises(Internal, match=str(version)):
        control_file.as_standby(content, CONSISTENT)


@pytest.mark.parametrize("length", [0, 8, CRC_AT, CRC_AT + 3])
def test_a_short_file_is_corrupt(cluster: Cluster, length: int) -> None:
    with pytest.raises(CorruptData, match="too short"):
        control_file.redo_of(cluster.original[:length])
    with pytest.raises(CorruptData, match="too short"):
        control_file.as_standby(cluster.original[:length], CONSISTENT)


def test_only_the_padding_behind_the_checksum_may_be_missing(cluster: Cluster) -> None:
    short = cluster.original[: CRC_AT + 4]
    assert control_file.redo_of(short) == control_file.redo_of(cluster.original)
