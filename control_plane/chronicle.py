"""Puts what happens into words: the events that go into the store with each change."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from boreal.types import Epoch, InstanceName, VolumeId
from control_plane.events import Event, EventKind
from control_plane.presence import Silence
from control_plane.view import Appointment, AppointWriter, Cause, Outcome, Switchover

WallClock = Callable[[], int]
"""Unix milliseconds, for display."""


def unix_ms() -> int:
    """The machine's wall time."""
    return time.time_ns() // 1_000_000


class Chronicle:
    """Writes events, as of now."""

    def __init__(self, wall_ms: WallClock) -> None:
        self._wall_ms = wall_ms

    def now_ms(self) -> int:
        """Wall time, for what will be told later."""
        return self._wall_ms()

    # --- instances -------------------------------------------------------------------------------

    def added(self, name: InstanceName) -> Event:
        """An instance reported for the first time."""
        return self._event(EventKind.INSTANCE_ADDED, name, f"{name} was added")

    def removed(self, name: InstanceName) -> Event:
        """It was forgotten on request."""
        return self._event(EventKind.INSTANCE_REMOVED, name, f"{name} was removed")

    def lost(self, name: InstanceName, silence: Silence) -> Event:
        """Nothing is heard of it."""
        return self._event(EventKind.INSTANCE_LOST, name, f"{name} is lost: {silence}")

    def back(self, name: InstanceName, *, started_over: bool) -> Event:
        """A lost one reports again."""
        how = "it started over" if started_over else "it was only out of sight"
        return self._event(EventKind.INSTANCE_RESTARTED, name, f"{name} is back: {how}")

    def volume_created(self, volume: VolumeId, maker: InstanceName) -> Event:
        """The volume is ready."""
        return self._event(EventKind.VOLUME_CREATED, maker, f"{maker} has made volume {volume}")

    # --- writers ---------------------------------------------------------------------------------

    def switchover_begins(self, writer: InstanceName, planned: Switchover) -> Event:
        """A planned failover begins."""
        message = f"planned: {writer} yields to {planned.target}"
        return self._event(EventKind.FAILOVER_STARTED, planned.target, message)

    def switchover_given_up(self, planned: Switchover, why: str) -> Event:
        """It will not come about."""
        return self._event(
            EventKind.FAILOVER_FAILED,
            planned.target,
            f"given up: {why}",
            started_ms=planned.started_ms,
        )

    def appointed(
        self, decision: AppointWriter, last: Appointment | None, planned: Switchover | None
    ) -> Iterable[Event]:
        """A writer is appointed after `last`: which may end a failover, and may begin one."""
        if last and last.outcome is Outcome.PENDING and last.cause is Cause.FAILOVER:
            yield self._event(
                EventKind.FAILOVER_FAILED,
                last.instance,
                f"{decision.why}, before it served under epoch {last.epoch}",
                started_ms=last.started_ms,
                epoch=last.epoch,
            )
        if decision.cause is Cause.FAILOVER and planned is None:
            yield self._event(
                EventKind.FAILOVER_STARTED,
                decision.instance,
                f"{decision.why}: {decision.instance} takes over under epoch {decision.epoch}",
                epoch=decision.epoch,
            )

    def serves(self, writer: Appointment) -> Iterable[Event]:
        """The appointed writer serves. Nothing is told of a volume's first one."""
        kind = {
            Cause.FAILOVER: EventKind.FAILOVER_COMPLETED,
            Cause.RESTART: EventKind.INSTANCE_RESTARTED,
        }.get(writer.cause)
        if kind is not None:
            yield self._event(
                kind,
                writer.instance,
                f"{writer.instance} is the writer under epoch {writer.epoch}",
                started_ms=writer.started_ms,
                epoch=writer.epoch,
            )

    def _event(
        self,
        kind: EventKind,
        instance: InstanceName,
        message: str,
        *,
        started_ms: int | None = None,
        epoch: Epoch | None = None,
    ) -> Event:
        now_ms = self._wall_ms()
        return Event(
            unix_ms=now_ms,
            kind=kind,
            instance=instance,
            message=message,
            # Wall time may have been set back meanwhile.
            took_ms=0 if started_ms is None else max(0, now_ms - started_ms),
            epoch=epoch,
        )


def still_lost(told: Iterable[Event]) -> set[InstanceName]:
    """The instances of which the last thing told is that they are lost."""
    lost: set[InstanceName] = set()
    for event in told:
        if event.kind is EventKind.INSTANCE_LOST:
            lost.add(event.instance)
        elif event.kind in {EventKind.INSTANCE_RESTARTED, EventKind.INSTANCE_REMOVED}:
            lost.discard(event.instance)
    return lost
