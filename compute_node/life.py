"""The states of a compute node, and the only place that changes them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from enum import Enum

import structlog

from boreal.errors import Internal

_log = structlog.get_logger(__name__)


class LifeState(Enum):
    """Where one incarnation of a compute node stands. Names as in proto/compute.proto."""

    WAITING = "waiting"
    CREATING = "creating"
    RESTORING = "restoring"
    READER = "reader"
    PROMOTING = "promoting"
    WRITER = "writer"
    STOPPING = "stopping"
    YIELDING = "yielding"


_NEXT = {
    LifeState.WAITING: {LifeState.CREATING, LifeState.RESTORING, LifeState.STOPPING},
    LifeState.CREATING: {LifeState.WAITING, LifeState.STOPPING},
    LifeState.RESTORING: {LifeState.READER, LifeState.STOPPING},
    LifeState.READER: {LifeState.PROMOTING, LifeState.STOPPING},
    LifeState.PROMOTING: {LifeState.WRITER, LifeState.STOPPING},
    LifeState.WRITER: {LifeState.YIELDING, LifeState.STOPPING},
    LifeState.YIELDING: {LifeState.STOPPING},
    LifeState.STOPPING: set(),
}


class Life:
    """One incarnation: from an empty PGDATA to the end of its PostgreSQL.

    Invariant: states follow `_NEXT`. A node whose PostgreSQL ended begins a new life under a new
    identity; the control plane gives an epoch to an identity, never to a machine, so no epoch is
    ever used by two runs of PostgreSQL.
    """

    def __init__(self, on_change: Callable[[], None] | None = None) -> None:
        """`on_change` is called after each change of state; it must not wait."""
        self._on_change = on_change
        self.identity = uuid.uuid4().hex
        self._state = LifeState.WAITING
        self._since = time.monotonic()

    @property
    def state(self) -> LifeState:
        """The current state."""
        return self._state

    def become(self, state: LifeState, why: str) -> None:
        """Change state; Internal if there is no such transition."""
        if state not in _NEXT[self._state]:
            raise Internal(
                f"a {self._state.value} compute node cannot become {state.value} ({why})"
            )
        now = time.monotonic()
        _log.info(
            "compute node changes state",
            old=self._state.value,
            new=state.value,
            why=why,
            after_s=round(now - self._since, 3),
            incarnation=self.identity,
        )
        self._state, self._since = state, now
        if self._on_change is not None:
            self._on_change()
