"""The store keeps what it was given and refuses what must not be.

Method: a real SQLite file, opened and opened again; a second process tries to open it too.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from boreal.errors import BadUsage, Internal, Refused
from boreal.types import Epoch, InstanceName, NodeName, VolumeId
from control_plane.decide import Appointment, Creation
from control_plane.state import ControlState, InstanceMember, StorageMember

VOLUME = VolumeId("vol-1")
CREATION = Creation(volume=VOLUME, instance=InstanceName("db-1"), incarnation="x")
NODE = StorageMember(
    name=NodeName("sn-1"), zone="a", log_address="h:1", frames_address="h:2", pages_address="h:3"
)
INSTANCE = InstanceMember(name=InstanceName("db-1"), address="h:4", postgres_port=5)


def appointment(epoch: int, incarnation: str) -> Appointment:
    return Appointment(epoch=Epoch(epoch), instance=InstanceName("db-1"), incarnation=incarnation)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.db"


@pytest.fixture
def state(path: Path) -> Iterator[ControlState]:
    state = ControlState.open(path)
    yield state
    state.close()


def test_all_is_there_again(state: ControlState, path: Path) -> None:
    state.register_storage(NODE)
    state.register_instance(INSTANCE)
    state.begin_creation(CREATION)
    state.finish_creation(VOLUME, 2**64 - 1)
    state.appoint_writer(VOLUME, appointment(2, "x"))
    before = state.current
    state.close()
    again = ControlState.open(path)
    try:
        assert again.current == before
        assert again.current.storage == {"sn-1": NODE}
        assert again.current.instances == {"db-1": INSTANCE}
        assert again.current.volume == VOLUME
        assert again.current.writer == appointment(2, "x")
    finally:
        again.close()


def test_a_second_control_plane_is_refused(state: ControlState, path: Path) -> None:
    state.register_storage(NODE)
    code = (
        "import sys; from pathlib import Path; from control_plane.state import ControlState\n"
        "from boreal.errors import BadUsage\n"
        "try: ControlState.open(Path(sys.argv[1]))\n"
        "except BadUsage as error: sys.exit(str(error))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, check=False, timeout=60
    )
    assert other.returncode == 1
    assert b"in use" in other.stderr


def test_another_format_is_refused(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(BadUsage, match="format 99"):
        ControlState.open(path)


def test_something_else_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to look like one" * 100)
    with pytest.raises(BadUsage, match="not a database"):
        ControlState.open(path)


def test_epochs_only_grow_and_incarnations_get_one(state: ControlState) -> None:
    state.begin_creation(CREATION)
    with pytest.raises(Internal):
        state.appoint_writer(VOLUME, appointment(2, "x"))
    state.finish_creation(VOLUME, 7)
    with pytest.raises(Internal):
        state.appoint_writer(VOLUME, appointment(1, "x"))
    state.appoint_writer(VOLUME, appointment(4, "x"))
    for refused in (appointment(4, "y"), appointment(3, "y"), appointment(5, "x")):
        with pytest.raises(Internal):
            state.appoint_writer(VOLUME, refused)
    state.appoint_writer(VOLUME, appointment(5, "y"))
    assert state.current.writer == appointment(5, "y")


def test_a_creation_that_was_given_up_cannot_end(state: ControlState) -> None:
    state.begin_creation(CREATION)
    second = Creation(volume=VolumeId("vol-2"), instance=InstanceName("db-1"), incarnation="y")
    state.begin_creation(second)
    with pytest.raises(Refused, match="given up"):
        state.finish_creation(VOLUME, 7)
    with pytest.raises(Refused, match="unknown"):
        state.finish_creation(VolumeId("vol-9"), 7)
    state.finish_creation(second.volume, 7)
    state.finish_creation(second.volume, 7)
    assert state.current.volume == second.volume
    assert state.current.known_volumes == {VOLUME, second.volume}
    with pytest.raises(Internal):  # there is a ready one
        state.begin_creation(
            Creation(volume=VolumeId("vol-3"), instance=InstanceName("db-1"), incarnation="z")
        )
    assert state.current.volume == second.volume
