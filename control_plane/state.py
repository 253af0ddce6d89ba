"""What the control plane must never forget, in SQLite: members, the volume, writers, events."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from boreal.errors import BadUsage, DiskFull, Internal, Refused
from boreal.types import Epoch, InstanceName, NodeName, VolumeId
from control_plane import events
from control_plane.events import Event
from control_plane.view import CREATION_EPOCH, Appointment, Cause, Creation, Outcome, Switchover

_VERSION = 3
_SCHEMA = f"""
CREATE TABLE storage_node (
    name TEXT PRIMARY KEY,
    zone TEXT NOT NULL,
    log_address TEXT NOT NULL,
    frames_address TEXT NOT NULL,
    pages_address TEXT NOT NULL,
    page_frames_address TEXT NOT NULL
) STRICT;

CREATE TABLE instance (
    name TEXT PRIMARY KEY,
    address TEXT NOT NULL,
    postgres_port INTEGER NOT NULL
) STRICT;

-- Who makes, or made, each volume. At most one is not abandoned.
CREATE TABLE volume (
    id TEXT PRIMARY KEY,
    status TEXT NOT NULL CHECK (status IN ('creating', 'ready', 'abandoned')),
    instance TEXT NOT NULL,
    incarnation TEXT NOT NULL,
    system_identifier TEXT,  -- 64 bits unsigned, so not an INTEGER
    named_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
) STRICT;
CREATE UNIQUE INDEX one_volume ON volume ((1)) WHERE status <> 'abandoned';

-- Every writer there ever was: one incarnation for an epoch, one epoch for an incarnation.
CREATE TABLE epoch (
    volume_id TEXT NOT NULL REFERENCES volume (id),
    epoch INTEGER NOT NULL CHECK (epoch > {CREATION_EPOCH}),
    instance TEXT NOT NULL,
    incarnation TEXT NOT NULL,
    cause TEXT NOT NULL CHECK (cause IN ('first', 'restart', 'failover')),
    outcome TEXT NOT NULL CHECK (outcome IN ('pending', 'served', 'failed')),
    started_ms INTEGER NOT NULL,
    allocated_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (volume_id, epoch),
    UNIQUE (instance, incarnation)
) STRICT;
CREATE UNIQUE INDEX one_pending ON epoch ((1)) WHERE outcome = 'pending';

-- The planned failover whose writer has not made way yet, if there is one.
CREATE TABLE switchover (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    epoch INTEGER NOT NULL,
    target TEXT NOT NULL,
    started_ms INTEGER NOT NULL
) STRICT;
{events.SCHEMA}
PRAGMA user_version = {_VERSION};
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageMember:
    """A storage node as it registered."""

    name: NodeName
    zone: str
    log_address: str
    frames_address: str
    pages_address: str
    page_frames_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceMember:
    """A compute node as it registered."""

    name: InstanceName
    address: str
    postgres_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DurableState:
    """The content of the store, as of the last commit."""

    storage: Mapping[NodeName, StorageMember]
    instances: Mapping[InstanceName, InstanceMember]
    known_volumes: frozenset[VolumeId]
    creation: Creation | None
    """The one that is under way."""
    volume: VolumeId | None
    maker: Creation | None
    """The creation that made `volume`."""
    appointments: Mapping[tuple[InstanceName, str], Epoch]
    writer: Appointment | None
    formers: tuple[Appointment, ...]
    """The writers before the last one, from the last one of them that served on."""
    switchover: Switchover | None
    last_event: int
    """The newest event's id."""


class ControlState:
    """The store, and its only owner: a second process that opens it is refused.

    Every method that changes something has it on disk when it returns, with the events that tell
    of it; `current` is what is there.
    Invariants: epochs of a volume are allocated in strictly growing order; at most the last
    appointment is pending; a switchover is from the last appointment, which served.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._current = _read(connection)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the store, or make it; BadUsage if it is in use or of another kind."""
        connection = sqlite3.connect(path, isolation_level=None, timeout=1.0)
        try:
            # EXCLUSIVE: the lock is taken at the first access and held until the process ends.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            elif version != _VERSION:
                raise BadUsage(f"{path} has format {version}; this control plane knows {_VERSION}")
            return cls(connection)
        except sqlite3.DatabaseError as error:
            connection.close()
            raise BadUsage(
                f"cannot open {path}: {error}. It is either in use by another control plane, or "
                "not a control plane's store"
            ) from error
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """Let go of the store."""
        self._connection.close()

    @property
    def current(self) -> DurableState:
        """What is durable."""
        return self._current

    def register_storage(self, member: StorageMember) -> None:
        """Remember a storage node, or where it is now."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO storage_node VALUES (?, ?, ?, ?, ?, ?)",
                (
                    member.name,
                    member.zone,
                    member.log_address,
                    member.frames_address,
                    member.pages_address,
                    member.page_frames_address,
                ),
            )

    def register_instance(self, member: InstanceMember, *told: Event) -> None:
        """Remember a compute node, or where it is now."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO instance VALUES (?, ?, ?)",
                (member.name, member.address, member.postgres_port),
            )
            events.append(db, told)

    def remove_instance(self, name: InstanceName, *told: Event) -> None:
        """Forget a compute node. Whatever epochs it had stay on record."""
        with self._transaction() as db:
            db.execute("DELETE FROM instance WHERE name = ?", (name,))
            events.append(db, told)

    def begin_creation(self, creation: Creation) -> None:
        """Give up the volume that is in creation, if any, and name a new one."""
        with self._transaction() as db:
            db.execute("UPDATE volume SET status = 'abandoned' WHERE status = 'creating'")
            db.execute(
                "INSERT INTO volume (id, status, instance, incarnation) "
                "VALUES (?, 'creating', ?, ?)",
                (creation.volume, creation.instance, creation.incarnation),
            )

    def finish_creation(self, volume: VolumeId, system_identifier: int, *told: Event) -> None:
        """The volume is ready. Idempotent; Refused if it was given up."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT status, system_identifier FROM volume WHERE id = ?", (volume,)
            ).fetchone()
            if row == ("ready", str(system_identifier)):
                return
            if row is None or row[0] != "creating":
                state = "unknown" if row is None else row[0]
                raise Refused(f"volume {volume} is {state}: its creation was given up")
            db.execute(
                "UPDATE volume SET status = 'ready', system_identifier = ? WHERE id = ?",
                (str(system_identifier), volume),
            )
            events.append(db, told)

    def appoint_writer(self, volume: VolumeId, appointment: Appointment, *told: Event) -> None:
        """Allocate an epoch: it must be on disk before anyone hears of it.

        An appointment that was pending has failed with this, and a switchover has left the stage in
        which the writer yields.
        """
        last = self._current.writer
        if volume != self._current.volume or (last and appointment.epoch <= last.epoch):
            raise Internal(f"{appointment} of {volume} does not follow {last}")
        with self._transaction() as db:
            db.execute("UPDATE epoch SET outcome = 'failed' WHERE outcome = 'pending'")
            db.execute("DELETE FROM switchover")
            db.execute(
                "INSERT INTO epoch "
                "(volume_id, epoch, instance, incarnation, cause, outcome, started_ms) "
                "VALUES (?, ?, ?, ?, ?, 'pending', ?)",
                (
                    volume,
                    appointment.epoch,
                    appointment.instance,
                    appointment.incarnation,
                    appointment.cause.value,
                    appointment.started_ms,
                ),
            )
            events.append(db, told)

    def note_service(self, epoch: Epoch, *told: Event) -> None:
        """The writer of that epoch, the last one, serves."""
        writer = self._current.writer
        if writer is None or (writer.epoch, writer.outcome) != (epoch, Outcome.PENDING):
            raise Internal(f"epoch {epoch} is not the pending one: {writer}")
        with self._transaction() as db:
            db.execute("UPDATE epoch SET outcome = 'served' WHERE outcome = 'pending'")
            events.append(db, told)

    def begin_switchover(self, switchover: Switchover, *told: Event) -> None:
        """The writer of that epoch is to yield to the target."""
        writer = self._current.writer
        if writer is None or (writer.epoch, writer.outcome) != (switchover.epoch, Outcome.SERVED):
            raise Internal(f"{switchover} is not from the writer that serves: {writer}")
        with self._transaction() as db:
            db.execute(
                "INSERT INTO switchover (one, epoch, target, started_ms) VALUES (1, ?, ?, ?)",
                (switchover.epoch, switchover.target, switchover.started_ms),
            )
            events.append(db, told)

    def give_up_switchover(self, *told: Event) -> None:
        """The planned failover does not come about."""
        with self._transaction() as db:
            db.execute("DELETE FROM switchover")
            events.append(db, told)

    def record(self, *told: Event) -> None:
        """Remember events."""
        with self._transaction() as db:
            events.append(db, told)

    def events_after(self, event_id: int) -> list[Event]:
        """The events with a higher id, oldest first."""
        return events.after(self._connection, event_id)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection
            self._connection.execute("COMMIT")
        except sqlite3.IntegrityError as error:
            raise Internal(f"the control plane's store refuses a change: {error}") from error
        except sqlite3.OperationalError as error:
            raise DiskFull(f"the control plane cannot write its store: {error}") from error
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        self._current = _read(self._connection)


def _read(db: sqlite3.Connection) -> DurableState:
    nodes = [
        StorageMember(
            name=NodeName(name),
            zone=zone,
            log_address=log,
            frames_address=frames,
            pages_address=pages,
            page_frames_address=page_frames,
        )
        for name, zone, log, frames, pages, page_frames in db.execute(
            "SELECT * FROM storage_node ORDER BY name"
        )
    ]
    instances = [
        InstanceMember(name=InstanceName(name), address=address, postgres_port=port)
        for name, address, port in db.execute("SELECT * FROM instance ORDER BY name")
    ]
    volumes = {
        status: Creation(
            volume=VolumeId(volume), instance=InstanceName(instance), incarnation=incarnation
        )
        for volume, status, instance, incarnation in db.execute(
            "SELECT id, status, instance, incarnation FROM volume WHERE status <> 'abandoned'"
        )
    }
    maker = volumes.get("ready")
    writers = _read_writers(db)
    return DurableState(
        storage={node.name: node for node in nodes},
        instances={instance.name: instance for instance in instances},
        known_volumes=frozenset(VolumeId(row[0]) for row in db.execute("SELECT id FROM volume")),
        creation=volumes.get("creating"),
        volume=maker.volume if maker else None,
        maker=maker,
        appointments={(each.instance, each.incarnation): each.epoch for each in writers},
        writer=writers[-1] if writers else None,
        formers=_from_last_served(writers[:-1]),
        switchover=_read_switchover(db),
        last_event=events.last_id(db),
    )


def _read_writers(db: sqlite3.Connection) -> list[Appointment]:
    return [
        Appointment(
            epoch=Epoch(epoch),
            instance=InstanceName(instance),
            incarnation=incarnation,
            cause=Cause(cause),
            outcome=Outcome(outcome),
            started_ms=started_ms,
        )
        for epoch, instance, incarnation, cause, outcome, started_ms in db.execute(
            "SELECT epoch, instance, incarnation, cause, outcome, started_ms "
            "FROM epoch ORDER BY epoch"
        )
    ]


def _from_last_served(writers: list[Appointment]) -> tuple[Appointment, ...]:
    """The last writer that served, which waited for all before it, and those after it."""
    served = [n for n, each in enumerate(writers) if each.outcome is Outcome.SERVED]
    return tuple(writers[served[-1] :] if served else writers)


def _read_switchover(db: sqlite3.Connection) -> Switchover | None:
    row = db.execute("SELECT epoch, target, started_ms FROM switchover").fetchone()
    if row is None:
        return None
    epoch, target, started_ms = row
    return Switchover(epoch=Epoch(epoch), target=InstanceName(target), started_ms=started_ms)
