"""The shell around `decide`: who was heard when; decisions made durable before orders go out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from boreal.errors import BadUsage, Internal
from boreal.quorum import SIX_WAY
from boreal.types import Epoch, InstanceName, Lsn, NodeName, VolumeId
from control_plane.decide import (
    Appointment,
    AppointWriter,
    BeginCreation,
    ClusterView,
    Creation,
    Decision,
    InstanceState,
    InstanceView,
    Order,
    StorageView,
    decide,
    order_for,
)
from control_plane.state import ControlState, InstanceMember, StorageMember

Clock = Callable[[], float]
"""Monotonic seconds."""

ALIVE_WITHIN_MS = 2_000
"""A member that was heard within this is alive. Reports come every few hundred milliseconds."""
LOST_AFTER_MS = 5_000
"""An instance silent for longer may lose its task to another instance, if there is one."""

_MAX_DECISIONS = 8
"""More in a row than any situation calls for."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceReport:
    """What a compute node last said of itself."""

    incarnation: str
    state: InstanceState
    replay: Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """How long nothing was heard of a member."""

    ms: int
    heard: bool
    """False: never since this control plane started, and `ms` counts from then."""

    @property
    def alive(self) -> bool:
        """Whether it reported lately."""
        return self.heard and self.ms <= ALIVE_WITHIN_MS


class Coordinator:
    """Owner of everything the control plane knows, durable or not.

    Invariant: an order that names a volume or an epoch rests on committed state alone.
    """

    def __init__(
        self, state: ControlState, clock: Clock, name_volume: Callable[[], VolumeId]
    ) -> None:
        self._state = state
        self._clock = clock
        self._name_volume = name_volume
        self._started = clock()
        self._heard: dict[str, float] = {}
        self._promised: dict[NodeName, tuple[tuple[VolumeId, Epoch], ...]] = {}
        self._reports: dict[InstanceName, InstanceReport] = {}

    @property
    def state(self) -> ControlState:
        """The durable part."""
        return self._state

    def storage_reported(
        self, member: StorageMember, promised: tuple[tuple[VolumeId, Epoch], ...]
    ) -> None:
        """A storage node told that it lives, where it is and what it holds."""
        known = self._state.current.storage
        if member.name not in known and len(known) >= SIX_WAY.copies:
            raise BadUsage(
                f"this cluster has its {SIX_WAY.copies} storage nodes "
                f"({', '.join(known)}); {member.name} is one too many"
            )
        if known.get(member.name) != member:
            self._state.register_storage(member)
            _log.info("storage node registered", node=member.name, address=member.log_address)
        self._heard[member.name] = self._clock()
        self._promised[member.name] = promised

    def instance_reported(self, member: InstanceMember, report: InstanceReport) -> Order:
        """A compute node told of itself; return its standing order."""
        if self._state.current.instances.get(member.name) != member:
            self._state.register_instance(member)
            _log.info("instance registered", instance=member.name, address=member.address)
        self._heard[member.name] = self._clock()
        self._note(member.name, report)
        self._settle()
        return order_for(self.view(), member.name)

    def volume_created(self, volume: VolumeId, system_identifier: int) -> None:
        """The instance that was ordered to has made the volume. Idempotent."""
        self._state.finish_creation(volume, system_identifier)
        _log.info("volume ready", volume=volume)

    def silence(self, name: str) -> Silence:
        """How long ago the member was heard."""
        heard = self._heard.get(name)
        since = self._started if heard is None else heard
        return Silence(ms=round((self._clock() - since) * 1000), heard=heard is not None)

    def view(self) -> ClusterView:
        """All that decisions rest on, as of now."""
        durable = self._state.current
        return ClusterView(
            storage=tuple(
                StorageView(
                    name=name,
                    alive=self.silence(name).alive,
                    promised=self._promised.get(name, ()),
                )
                for name in durable.storage
            ),
            instances=tuple(self._view_instance(name) for name in durable.instances),
            known_volumes=durable.known_volumes,
            creation=durable.creation,
            volume=durable.volume,
            writer=durable.writer,
        )

    def _view_instance(self, name: InstanceName) -> InstanceView:
        report = self._reports.get(name)
        lost = self.silence(name).ms > LOST_AFTER_MS
        if report is None:
            return InstanceView(
                name=name,
                incarnation=None,
                state=InstanceState.WAITING,
                lost=lost,
                appointed=None,
                replay=Lsn(0),
            )
        return InstanceView(
            name=name,
            incarnation=report.incarnation,
            state=report.state,
            lost=lost,
            appointed=self._state.current.appointments.get((name, report.incarnation)),
            replay=report.replay,
        )

    def _note(self, name: InstanceName, report: InstanceReport) -> None:
        before = self._reports.get(name)
        self._reports[name] = report
        if before is None or before.incarnation != report.incarnation:
            _log.info("new incarnation", instance=name, incarnation=report.incarnation)
        elif before.state is not report.state:
            _log.info(
                "instance changed", instance=name, old=before.state.name, new=report.state.name
            )

    def _settle(self) -> None:
        """Decide and make durable until nothing is left to decide.

        Only when an instance reports: whoever is given something hears of it in an answer.
        """
        for _ in range(_MAX_DECISIONS):
            decision = decide(self.view())
            if decision is None:
                return
            self._carry_out(decision)
        raise Internal("the control plane's decisions do not come to rest")

    def _carry_out(self, decision: Decision) -> None:
        match decision:
            case BeginCreation(instance=instance, incarnation=incarnation):
                creation = Creation(
                    volume=self._name_volume(), instance=instance, incarnation=incarnation
                )
                self._state.begin_creation(creation)
                _log.info("creation begins", volume=creation.volume, instance=instance)
            case AppointWriter(
                volume=volume, epoch=epoch, instance=instance, incarnation=incarnation
            ):
                self._state.appoint_writer(
                    volume, Appointment(epoch=epoch, instance=instance, incarnation=incarnation)
                )
                _log.info("writer appointed", volume=volume, epoch=epoch, instance=instance)
