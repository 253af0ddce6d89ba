"""The instances as they last reported. Volatile: a control plane that starts knows nothing yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import structlog

from boreal.errors import MalformedRequest, Refused
from boreal.types import Epoch, InstanceName, Lsn
from control_plane.presence import Clock, Presence
from control_plane.routing import Place
from control_plane.state import InstanceMember
from control_plane.view import MAX_TIER, InstanceState, InstanceView

_KEPT_INCARNATIONS = 16

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceReport:
    """What a compute node last said of itself."""

    incarnation: str
    state: InstanceState
    replay: Lsn
    tier: int = 0
    takes_clients: bool = False
    handover: str = ""


class Roll:
    """Each instance's last report and when it came.

    Invariant: the incarnations of an instance follow one another; none comes back.
    """

    def __init__(self, clock: Clock) -> None:
        self.presence = Presence(clock)
        self._reports: dict[InstanceName, InstanceReport] = {}
        self._former: dict[InstanceName, deque[str]] = {}

    def check(self, name: InstanceName, report: InstanceReport) -> None:
        """Refused if a later incarnation reported already: this one is gone, or should be."""
        if not 0 <= report.tier <= MAX_TIER:
            raise MalformedRequest(f"tier {report.tier} does not exist; tiers are 0 to {MAX_TIER}")
        if report.incarnation in self._former.get(name, ()):
            raise Refused(
                f"{name} reported another incarnation after {report.incarnation}: two agents use "
                "the same name, or this message was late"
            )

    def note(self, name: InstanceName, report: InstanceReport) -> tuple[int, bool]:
        """Take a checked report; return this call's number and whether the instance started over.

        It has not if this is the first that is heard of it.
        """
        before = self._reports.get(name)
        self._reports[name] = report
        started_over = before is not None and before.incarnation != report.incarnation
        if before is None or started_over:
            _log.info("new incarnation", instance=name, incarnation=report.incarnation)
        elif before.state is not report.state:
            _log.info(
                "instance changed", instance=name, old=before.state.name, new=report.state.name
            )
        if before is not None and started_over:
            former = self._former.setdefault(name, deque(maxlen=_KEPT_INCARNATIONS))
            former.append(before.incarnation)
        return self.presence.heard(name), started_over

    def forget(self, name: InstanceName) -> None:
        """It is no member any more."""
        self.presence.forget(name)
        self._reports.pop(name, None)
        self._former.pop(name, None)

    def stopping(self, name: InstanceName) -> bool:
        """Whether it said that it was stopping: its silence is no surprise."""
        report = self._reports.get(name)
        return report is not None and report.state is InstanceState.STOPPING

    def view(
        self, name: InstanceName, appointments: Mapping[tuple[InstanceName, str], Epoch]
    ) -> InstanceView:
        """The instance at this moment."""
        report = self._reports.get(name)
        lost = self.presence.silence(name).lost
        if report is None:
            return InstanceView(
                name=name,
                incarnation=None,
                state=InstanceState.WAITING,
                lost=lost,
                appointed=None,
                tier=MAX_TIER,
                replay=Lsn(0),
                takes_clients=False,
            )
        return InstanceView(
            name=name,
            incarnation=report.incarnation,
            state=report.state,
            lost=lost,
            appointed=appointments.get((name, report.incarnation)),
            tier=report.tier,
            replay=report.replay,
            takes_clients=report.takes_clients,
        )

    def places(self, members: Iterable[InstanceMember]) -> dict[InstanceName, Place]:
        """Where those that were heard take connections."""
        return {
            member.name: Place(
                host=member.address.rpartition(":")[0],
                postgres_port=member.postgres_port,
                handover=self._reports[member.name].handover,
            )
            for member in members
            if member.name in self._reports
        }
