"""`boreal events`: what happened, a line for each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime

from rich.text import Text

from boreal.command.remote import Place, connect, if_reachable, of_control_plane
from boreal.command.status import Json
from boreal.rpc import control_pb2

_FOLLOW_POLL_S = 0.3
_STYLES = {
    control_pb2.Event.FAILOVER_STARTED: "yellow",
    control_pb2.Event.FAILOVER_COMPLETED: "bold green",
    control_pb2.Event.FAILOVER_FAILED: "bold red",
    control_pb2.Event.INSTANCE_LOST: "red",
}


async def show(place: Place, print_one: Callable[[control_pb2.Event], None]) -> int:
    """Pass on all there is; return the id of the last, 0 if there is none."""
    async with connect(place) as remote:
        events = await of_control_plane(remote.events(), place)
    for event in events:
        print_one(event)
    return events[-1].id if events else 0


async def follow(place: Place, after: int, print_one: Callable[[control_pb2.Event], None]) -> None:
    """Pass on what comes after the event of that id, until cancelled, the control plane's absences
    included.
    """
    async with connect(place) as remote:
        while True:
            for event in await if_reachable(remote.events(after)) or ():
                print_one(event)
                after = event.id
            await asyncio.sleep(_FOLLOW_POLL_S)


def to_line(event: control_pb2.Event) -> Text:
    """For people, in local time."""
    at = datetime.fromtimestamp(event.unix_ms / 1000, UTC).astimezone()
    took = f"  ({event.took_ms / 1000:.2f} s)" if event.took_ms else ""
    return Text.assemble(
        (f"{at:%Y-%m-%d %H:%M:%S}.{event.unix_ms % 1000:03}  ", "dim"),
        (f"{_kind(event).replace('_', ' '):<20}", _STYLES.get(event.kind, "")),
        f"{event.instance:<6} ",
        event.message,
        (took, "bold"),
    )


def to_json(event: control_pb2.Event) -> str:
    """For programs: one line, one object; `took_ms` is null of what takes no time."""
    at = datetime.fromtimestamp(event.unix_ms / 1000, UTC)
    row: Json = {
        "id": event.id,
        "at": at.isoformat(timespec="milliseconds"),
        "kind": _kind(event),
        "instance": event.instance or None,
        "message": event.message,
        "took_ms": event.took_ms or None,
    }
    return json.dumps(row)


def _kind(event: control_pb2.Event) -> str:
    return control_pb2.Event.Kind.Name(event.kind).lower()
