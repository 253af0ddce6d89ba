"""The shell around `decide`: who was heard when; decisions made durable before orders go out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog

from boreal.errors import BadUsage, Internal
from boreal.quorum import SIX_WAY
from boreal.types import Epoch, InstanceName, NodeName, VolumeId
from control_plane import switchover
from control_plane.chronicle import Chronicle, WallClock, still_lost, unix_ms
from control_plane.decide import decide, order_for
from control_plane.events import Event
from control_plane.presence import Clock, Presence, Silence
from control_plane.roll import InstanceReport, Roll
from control_plane.routing import Route, routes
from control_plane.state import ControlState, InstanceMember, StorageMember
from control_plane.view import (
    Appointment,
    AppointWriter,
    BeginCreation,
    ClusterView,
    Creation,
    Decision,
    GiveUpSwitchover,
    Order,
    OrderKind,
    StorageView,
    Switchover,
    WriterServes,
)

MAX_INSTANCES = 16
"""A writer and fifteen readers, as Aurora."""
YIELD_S = 5.0
"""How long a writer may take to make way. Its agent bounds each step of that more tightly."""

_MAX_DECISIONS = 8
"""More in a row than any situation calls for."""
_UNREGISTERED = Order(kind=OrderKind.WAIT, reason="this instance is not registered yet")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What follows for others from all that is known; somebody waits for its changes.

    Orders and routes rest on committed state alone.
    """

    orders: Mapping[InstanceName, Order]
    routes: tuple[Route, ...]
    informed: bool
    """Every instance was heard, or had the time to be: so `routes` is the whole truth."""
    lost: frozenset[InstanceName]
    last_event: int


class Coordinator:
    """Owner of everything the control plane knows, durable or not.

    `on_change` is called whenever `outlook` became another. Time alone changes it too: somebody has
    to call `tick` several times a second.

    Invariant: an order that names a volume or an epoch rests on committed state alone.
    """

    def __init__(
        self,
        state: ControlState,
        clock: Clock,
        name_volume: Callable[[], VolumeId],
        *,
        wall_ms: WallClock = unix_ms,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._state = state
        self._clock = clock
        self._name_volume = name_volume
        self._chronicle = Chronicle(wall_ms)
        self._on_change = on_change
        self._nodes = Presence(clock)
        self._promised: dict[NodeName, tuple[tuple[VolumeId, Epoch], ...]] = {}
        self._roll = Roll(clock)
        self._yielding: tuple[Switchover, float] | None = None
        self._told_lost = still_lost(state.events_after(0))
        self._outlook = self._look_out()

    @property
    def state(self) -> ControlState:
        """The durable part."""
        return self._state

    @property
    def outlook(self) -> Outlook:
        """What follows from all that is known, as of the last report or tick."""
        return self._outlook

    def order(self, name: InstanceName) -> Order:
        """The instance's standing order."""
        return self._outlook.orders.get(name, _UNREGISTERED)

    # --- what members tell -----------------------------------------------------------------------

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
        returned = not self.node_silence(member.name).alive
        self._nodes.heard(member.name)
        self._promised[member.name] = promised
        if returned:
            self.tick()

    def instance_reported(self, member: InstanceMember, report: InstanceReport) -> int:
        """A compute node told of itself; return a number for this call of it.

        Refused if a later incarnation of it reported already: this one is gone, or should be.
        """
        self._roll.check(member.name, report)
        self._register(member)
        call, started_over = self._roll.note(member.name, report)
        if member.name in self._told_lost:
            self._state.record(self._chronicle.back(member.name, started_over=started_over))
            self._told_lost.discard(member.name)
        self.tick()
        return call

    def instance_cut(self, name: InstanceName, call: int) -> None:
        """The instance's call broke off before it was answered: if it doesn't call again it died.

        Of a call that was followed by another it means nothing.
        """
        self._roll.presence.cut(name, call)

    def volume_created(self, volume: VolumeId, system_identifier: int, maker: InstanceName) -> None:
        """The instance that was ordered to has made the volume. Idempotent."""
        event = self._chronicle.volume_created(volume, maker)
        self._state.finish_creation(volume, system_identifier, event)
        _log.info("volume ready", volume=volume)
        self.tick()

    # --- what people ask -------------------------------------------------------------------------

    def begin_failover(self, target: InstanceName | None) -> Event:
        """Begin a planned failover, to the best reader if no target is named; return its event.

        It ends with the next event that says completed or failed. BadUsage, NotNow.
        """
        writer, planned = switchover.plan(self.view(), target, self._chronicle.now_ms())
        self._state.begin_switchover(planned, self._chronicle.switchover_begins(writer, planned))
        _log.info("switchover begins", epoch=planned.epoch, target=planned.target)
        (event,) = self._state.events_after(self._state.current.last_event - 1)
        self.tick()
        return event

    def remove_instance(self, name: InstanceName) -> None:
        """Forget a compute node. BadUsage if it is the writer, or may be alive."""
        durable = self._state.current
        if name not in durable.instances:
            there = ", ".join(durable.instances) or "none"
            raise BadUsage(f"there is no instance {name}; there are: {there}")
        if durable.writer and durable.writer.instance == name:
            raise BadUsage(f"{name} is the writer; let `boreal failover` make it another one first")
        if not self.instance_silence(name).lost:
            raise BadUsage(f"{name} is alive; stop it first")
        self._state.remove_instance(name, self._chronicle.removed(name))
        self._roll.forget(name)
        self._told_lost.discard(name)
        _log.info("instance removed", instance=name)
        self.tick()

    def stopping(self, name: InstanceName) -> bool:
        """Whether the instance said that it was stopping."""
        return self._roll.stopping(name)

    def node_silence(self, name: NodeName) -> Silence:
        """How long ago the storage node was heard."""
        return self._nodes.silence(name)

    def instance_silence(self, name: InstanceName) -> Silence:
        """How long ago the instance was heard."""
        return self._roll.presence.silence(name)

    def view(self) -> ClusterView:
        """All that decisions rest on, as of now."""
        durable = self._state.current
        return ClusterView(
            storage=tuple(
                StorageView(
                    name=name,
                    alive=self._nodes.silence(name).alive,
                    promised=self._promised.get(name, ()),
                )
                for name in durable.storage
            ),
            instances=tuple(
                self._roll.view(name, durable.appointments) for name in durable.instances
            ),
            known_volumes=durable.known_volumes,
            creation=durable.creation,
            volume=durable.volume,
            maker=durable.maker,
            writer=durable.writer,
            formers=durable.formers,
            switchover=durable.switchover,
            switchover_overdue=self._overdue(durable.switchover),
        )

    # --- inside ----------------------------------------------------------------------------------

    def _register(self, member: InstanceMember) -> None:
        members = self._state.current.instances
        known = members.get(member.name)
        if known == member:
            return
        if known is None and len(members) >= MAX_INSTANCES:
            raise BadUsage(f"this cluster has its {MAX_INSTANCES} instances already")
        told = () if known else (self._chronicle.added(member.name),)
        self._state.register_instance(member, *told)
        _log.info("instance registered", instance=member.name, address=member.address)

    def _overdue(self, current: Switchover | None) -> bool:
        """Whether the writer was told to yield long ago; as of when this process first told it."""
        if current is None:
            self._yielding = None
            return False
        if self._yielding is None or self._yielding[0] != current:
            self._yielding = current, self._clock()
        return self._clock() - self._yielding[1] > YIELD_S

    def tick(self) -> None:
        """Decide and make durable until nothing is left to decide; then tell what follows."""
        self._note_losses()
        for _ in range(_MAX_DECISIONS):
            decision = decide(self.view())
            if decision is None:
                break
            self._carry_out(decision)
        else:
            raise Internal("the control plane's decisions do not come to rest")
        outlook = self._look_out()
        if outlook != self._outlook:
            self._outlook = outlook
            self._on_change()

    def _look_out(self) -> Outlook:
        view, members = self.view(), self._state.current.instances
        silences = {name: self.instance_silence(name) for name in members}
        return Outlook(
            orders={name: order_for(view, name) for name in members},
            routes=routes(view, self._roll.places(members.values())),
            informed=all(silence.heard or silence.lost for silence in silences.values()),
            lost=frozenset(name for name, silence in silences.items() if silence.lost),
            last_event=self._state.current.last_event,
        )

    def _note_losses(self) -> None:
        """Tell of instances that are lost; not of those that were stopped on purpose."""
        if not self._roll.presence.anybody:
            return
        for name in self._state.current.instances.keys() - self._told_lost:
            silence = self.instance_silence(name)
            if silence.lost and not self._roll.stopping(name):
                self._state.record(self._chronicle.lost(name, silence))
                self._told_lost.add(name)
                _log.warning("instance lost", instance=name, why=str(silence))

    def _carry_out(self, decision: Decision) -> None:
        match decision:
            case BeginCreation():
                self._begin_creation(decision)
            case AppointWriter():
                self._appoint(decision)
            case WriterServes():
                self._note_service(decision)
            case GiveUpSwitchover():
                self._give_up_switchover(decision)

    def _begin_creation(self, decision: BeginCreation) -> None:
        creation = Creation(
            volume=self._name_volume(),
            instance=decision.instance,
            incarnation=decision.incarnation,
        )
        self._state.begin_creation(creation)
        _log.info("creation begins", volume=creation.volume, instance=creation.instance)

    def _appoint(self, decision: AppointWriter) -> None:
        durable = self._state.current
        planned = durable.switchover
        appointment = Appointment(
            epoch=decision.epoch,
            instance=decision.instance,
            incarnation=decision.incarnation,
            cause=decision.cause,
            started_ms=planned.started_ms if planned else self._chronicle.now_ms(),
        )
        told = self._chronicle.appointed(decision, durable.writer, planned)
        self._state.appoint_writer(decision.volume, appointment, *told)
        _log.info(
            "writer appointed",
            volume=decision.volume,
            epoch=decision.epoch,
            instance=decision.instance,
            cause=decision.cause.value,
            why=decision.why,
        )

    def _note_service(self, decision: WriterServes) -> None:
        writer = self._state.current.writer
        if writer is None or writer.epoch != decision.epoch:
            raise Internal(f"epoch {decision.epoch} is not the last one: {writer}")
        self._state.note_service(decision.epoch, *self._chronicle.serves(writer))
        _log.info("writer serves", epoch=decision.epoch, instance=writer.instance)

    def _give_up_switchover(self, decision: GiveUpSwitchover) -> None:
        planned = self._state.current.switchover
        if planned is None:
            raise Internal("there is no switchover to give up")
        self._state.give_up_switchover(self._chronicle.switchover_given_up(planned, decision.why))
        _log.warning("switchover given up", target=planned.target, why=decision.why)
