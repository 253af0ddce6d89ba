"""What the control plane must never forget, in SQLite: members, the volume, epochs."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from boreal.errors import BadUsage, DiskFull, Internal, Refused
from boreal.types import Epoch, InstanceName, NodeName, VolumeId
from control_plane.decide import CREATION_EPOCH, Appointment, Creation

_VERSION = 1
_SCHEMA = f"""
CREATE TABLE storage_node (
    name TEXT PRIMARY KEY,
    zone TEXT NOT NULL,
    log_address TEXT NOT NULL,
    frames_address TEXT NOT NULL,
    pages_address TEXT NOT NULL
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
    allocated_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (volume_id, epoch),
    UNIQUE (instance, incarnation)
) STRICT;

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
    volume: VolumeId | None
    appointments: Mapping[tuple[InstanceName, str], Epoch]
    writer: Appointment | None


class ControlState:
    """The store, and its only owner: a second process that opens it is refused.

    Every method that changes something has it on disk when it returns; `current` is what is there.
    Invariant: epochs of a volume are allocated in strictly growing order.
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
                "INSERT OR REPLACE INTO storage_node VALUES (?, ?, ?, ?, ?)",
                (
                    member.name,
                    member.zone,
                    member.log_address,
                    member.frames_address,
                    member.pages_address,
                ),
            )

    def register_instance(self, member: InstanceMember) -> None:
        """Remember a compute node, or where it is now."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO instance VALUES (?, ?, ?)",
                (member.name, member.address, member.postgres_port),
            )

    def begin_creation(self, creation: Creation) -> None:
        """Give up the volume that is in creation, if any, and name a new one."""
        with self._transaction() as db:
            db.execute("UPDATE volume SET status = 'abandoned' WHERE status = 'creating'")
            db.execute(
                "INSERT INTO volume (id, status, instance, incarnation) "
                "VALUES (?, 'creating', ?, ?)",
                (creation.volume, creation.instance, creation.incarnation),
            )

    def finish_creation(self, volume: VolumeId, system_identifier: int) -> None:
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

    def appoint_writer(self, volume: VolumeId, appointment: Appointment) -> None:
        """Allocate an epoch: it must be on disk before anyone hears of it."""
        last = self._current.writer
        if volume != self._current.volume or (last and appointment.epoch <= last.epoch):
            raise Internal(f"{appointment} of {volume} does not follow {last}")
        with self._transaction() as db:
            db.execute(
                "INSERT INTO epoch (volume_id, epoch, instance, incarnation) VALUES (?, ?, ?, ?)",
                (volume, appointment.epoch, appointment.instance, appointment.incarnation),
            )

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
        )
        for name, zone, log, frames, pages in db.execute("SELECT * FROM storage_node ORDER BY name")
    ]
    instances = [
        InstanceMember(name=InstanceName(name), address=address, postgres_port=port)
        for name, address, port in db.execute("SELECT * FROM instance ORDER BY name")
    ]
    volumes = db.execute("SELECT id, status, instance, incarnation FROM volume").fetchall()
    creating = [row for row in volumes if row[1] == "creating"]
    ready = [VolumeId(row[0]) for row in volumes if row[1] == "ready"]
    writers = [
        Appointment(epoch=Epoch(epoch), instance=InstanceName(instance), incarnation=incarnation)
        for epoch, instance, incarnation in db.execute(
            "SELECT epoch, instance, incarnation FROM epoch ORDER BY epoch"
        )
    ]
    return DurableState(
        storage={node.name: node for node in nodes},
        instances={instance.name: instance for instance in instances},
        known_volumes=frozenset(VolumeId(row[0]) for row in volumes),
        creation=Creation(
            volume=VolumeId(creating[0][0]),
            instance=InstanceName(creating[0][2]),
            incarnation=creating[0][3],
        )
        if creating
        else None,
        volume=ready[0] if ready else None,
        appointments={(each.instance, each.incarnation): each.epoch for each in writers},
        writer=writers[-1] if writers else None,
    )
