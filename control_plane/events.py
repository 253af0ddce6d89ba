"""What happened, for people: kept in the control plane's store, the last thousand."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from boreal.types import Epoch, InstanceName

KEPT_EVENTS = 1000

SCHEMA = """
CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given twice, though old ones are deleted
    unix_ms INTEGER NOT NULL,
    kind TEXT NOT NULL,
    instance TEXT NOT NULL,
    message TEXT NOT NULL,
    took_ms INTEGER NOT NULL,
    epoch INTEGER
) STRICT;
"""


class EventKind(Enum):
    """Event.Kind of control.proto."""

    FAILOVER_STARTED = "failover started"
    FAILOVER_COMPLETED = "failover completed"
    FAILOVER_FAILED = "failover failed"
    INSTANCE_ADDED = "instance added"
    INSTANCE_REMOVED = "instance removed"
    INSTANCE_LOST = "instance lost"
    INSTANCE_RESTARTED = "instance restarted"
    VOLUME_CREATED = "volume created"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened."""

    id: int = 0
    """Its place in the log of events; 0 while it is not in there."""
    unix_ms: int
    kind: EventKind
    instance: InstanceName
    """Whom it is about: the new writer, for failovers."""
    message: str
    took_ms: int = 0
    """Of what ended with this event."""
    epoch: Epoch | None = None


def append(db: sqlite3.Connection, events: Iterable[Event]) -> None:
    """Add events and drop the oldest ones beyond the bound, within the caller's transaction."""
    db.executemany(
        "INSERT INTO event (unix_ms, kind, instance, message, took_ms, epoch) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        [
            (each.unix_ms, each.kind.value, each.instance, each.message, each.took_ms, each.epoch)
            for each in events
        ],
    )
    db.execute("DELETE FROM event WHERE id <= ?", (last_id(db) - KEPT_EVENTS,))


def last_id(db: sqlite3.Connection) -> int:
    """The newest event's id; 0 if there is none."""
    (newest,) = db.execute("SELECT coalesce(max(id), 0) FROM event").fetchone()
    return int(newest)


def after(db: sqlite3.Connection, event_id: int) -> list[Event]:
    """The events with a higher id, oldest first."""
    rows = db.execute(
        "SELECT id, unix_ms, kind, instance, message, took_ms, epoch FROM event "
        "WHERE id > ? ORDER BY id",
        (event_id,),
    )
    return [
        Event(
            id=number,
            unix_ms=unix_ms,
            kind=EventKind(kind),
            instance=InstanceName(instance),
            message=message,
            took_ms=took_ms,
            epoch=None if epoch is None else Epoch(epoch),
        )
        for number, unix_ms, kind, instance, message, took_ms, epoch in rows
    ]
