"""The store keeps what it was given and refuses what must not be.

Method: a real SQLite file, opened and opened again; a second process tries to open it too.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from boreal.errors import BadUsage, Internal, Refused
from boreal.types import Epoch, InstanceName, NodeName, VolumeId
from control_plane import events
from control_plane.events import Event, EventKind
from control_plane.state import ControlState, InstanceMember, StorageMember
from control_plane.view import Appointment, Cause, Creation, Outcome, Switchover

VOLUME = VolumeId("vol-1")
CREATION = Creation(volume=VOLUME, instance=InstanceName("db-1"), incarnation="x")
NODE = StorageMember(
    name=NodeName("sn-1"),
    zone="a",
    log_address="h:1",
    frames_address="h:2",
    pages_address="h:3",
    page_frames_address="h:4",
)
INSTANCE = InstanceMember(name=InstanceName("db-1"), address="h:4", postgres_port=5)


def appointment(epoch: int, incarnation: str) -> Appointment:
    return Appointment(
        epoch=Epoch(epoch),
        instance=InstanceName("db-1"),
        incarnation=incarnation,
        cause=Cause.FAILOVER,
        started_ms=1_700_000_000_000 + epoch,
    )


def happened(kind: EventKind, took_ms: int = 0) -> Event:
    return Event(
        unix_ms=1_700_000_000_000,
        kind=kind,
        instance=InstanceName("db-1"),
        message="it happened",
        took_ms=took_ms,
        epoch=Epoch(2),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.db"


@pytest.fixture
def state(path: Path) -> Iterator[ControlState]:
    state = ControlState.open(path)
    yield state
    state.close()


@pytest.fixture
def writing(state: ControlState) -> ControlState:
    """A store with a volume and a writer that serves under epoch 2."""
    state.begin_creation(CREATION)
    state.finish_creation(VOLUME, 7)
    state.appoint_writer(VOLUME, appointment(2, "x"))
    state.note_service(Epoch(2))
    return state


def test_all_is_there_again(state: ControlState, path: Path) -> None:
    state.register_storage(NODE)
    state.register_instance(INSTANCE, happened(EventKind.INSTANCE_ADDED))
    state.begin_creation(CREATION)
    state.finish_creation(VOLUME, 2**64 - 1, happened(EventKind.VOLUME_CREATED))
    state.appoint_writer(VOLUME, appointment(2, "x"), happened(EventKind.FAILOVER_STARTED))
    state.note_service(Epoch(2), happened(EventKind.FAILOVER_COMPLETED, took_ms=812))
    switchover = Switchover(epoch=Epoch(2), target=InstanceName("db-2"), started_ms=5)
    state.begin_switchover(switchover, happened(EventKind.FAILOVER_STARTED))
    told = state.events_after(0)
    before = state.current
    state.close()
    again = ControlState.open(path)
    try:
        assert again.current == before
        assert again.current.storage == {"sn-1": NODE}
        assert again.current.instances == {"db-1": INSTANCE}
        assert again.current.volume == VOLUME
        assert again.current.writer == replace(appointment(2, "x"), outcome=Outcome.SERVED)
        assert again.current.switchover == switchover
        assert again.events_after(0) == told
        assert [event.id for event in told] == [1, 2, 3, 4, 5]
        assert again.events_after(3) == told[3:]
        assert (told[3].kind, told[3].took_ms) == (EventKind.FAILOVER_COMPLETED, 812)
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


def test_one_appointment_at_most_is_pending(writing: ControlState) -> None:
    with pytest.raises(Internal):
        writing.note_service(Epoch(2))
    writing.appoint_writer(VOLUME, appointment(3, "y"))
    writing.appoint_writer(VOLUME, appointment(4, "z"))
    with pytest.raises(Internal):
        writing.note_service(Epoch(3))
    current = writing.current
    assert current.writer == appointment(4, "z")
    # Whose lease may not have ended: from the last one on that served.
    assert [(each.epoch, each.outcome) for each in current.formers] == [
        (2, Outcome.SERVED),
        (3, Outcome.FAILED),
    ]
    writing.note_service(Epoch(4))
    writing.appoint_writer(VOLUME, appointment(5, "w"))
    assert [each.epoch for each in writing.current.formers] == [4]


def test_a_switchover_is_from_the_writer_that_serves_and_ends_with_the_next(
    writing: ControlState,
) -> None:
    target = InstanceName("db-2")
    with pytest.raises(Internal):
        writing.begin_switchover(Switchover(epoch=Epoch(1), target=target))
    writing.begin_switchover(Switchover(epoch=Epoch(2), target=target))
    with pytest.raises(Internal):  # there is one
        writing.begin_switchover(Switchover(epoch=Epoch(2), target=target))
    writing.give_up_switchover()
    assert writing.current.switchover is None
    writing.begin_switchover(Switchover(epoch=Epoch(2), target=target))
    writing.appoint_writer(VOLUME, appointment(3, "y"))
    assert writing.current.switchover is None
    with pytest.raises(Internal):  # it does not serve yet
        writing.begin_switchover(Switchover(epoch=Epoch(3), target=target))


def test_an_instance_is_forgotten_but_not_the_epochs_it_had(writing: ControlState) -> None:
    writing.register_instance(INSTANCE)
    writing.remove_instance(INSTANCE.name)
    assert not writing.current.instances
    with pytest.raises(Internal):
        writing.appoint_writer(VOLUME, appointment(3, "x"))


def test_a_refused_change_leaves_no_event(writing: ControlState) -> None:
    with pytest.raises(Internal):
        writing.appoint_writer(VOLUME, appointment(3, "x"), happened(EventKind.FAILOVER_STARTED))
    assert writing.events_after(0) == []


def test_old_events_make_room_and_no_number_is_given_twice(state: ControlState) -> None:
    many = [happened(EventKind.INSTANCE_LOST)] * (events.KEPT_EVENTS + 10)
    state.record(*many)
    state.record(happened(EventKind.INSTANCE_REMOVED))
    told = state.events_after(0)
    assert len(told) == events.KEPT_EVENTS
    assert told[0].id == 12
    assert told[-1].id == state.current.last_event == events.KEPT_EVENTS + 11
