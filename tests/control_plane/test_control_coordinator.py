"""The coordinator with its store: whatever happens and wherever it is cut off, promises hold.

Method: a state machine of instances that come, go and start over, storage nodes that fall silent,
time that passes, and a control plane that is killed, in its rest or in the middle of a change.
Killed means: its files are copied as they are at that moment, and the next one starts from the
copy.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from boreal.errors import Refused
from boreal.types import Epoch, InstanceName, Lsn, NodeName, VolumeId
from control_plane.coordinator import Coordinator, InstanceReport
from control_plane.decide import Appointment, Creation, InstanceState, Order, OrderKind
from control_plane.state import ControlState, InstanceMember, StorageMember

INSTANCES = st.sampled_from([InstanceName("db-1"), InstanceName("db-2")])
NODES = [NodeName(f"sn-{n}") for n in range(1, 7)]


def storage_member(name: NodeName) -> StorageMember:
    return StorageMember(
        name=name,
        zone="abc"[(int(name[3:]) - 1) // 2],
        log_address=f"{name}:1",
        frames_address=f"{name}:2",
        pages_address=f"{name}:3",
    )


class Killed(BaseException):
    """The control plane's process is gone."""


class FragileState(ControlState):
    """A store whose process is killed right before or right after its next commit."""

    dies: str = ""

    def die_at(self, moment: str) -> None:
        self.dies = moment

    def begin_creation(self, creation: Creation) -> None:
        with self.dying():
            super().begin_creation(creation)

    def appoint_writer(self, volume: VolumeId, appointment: Appointment) -> None:
        with self.dying():
            super().appoint_writer(volume, appointment)

    def finish_creation(self, volume: VolumeId, system_identifier: int) -> None:
        with self.dying():
            super().finish_creation(volume, system_identifier)

    @contextmanager
    def dying(self) -> Iterator[None]:
        if self.dies == "before":
            raise Killed
        yield
        if self.dies == "after":
            raise Killed


class ControlPlaneLife(RuleBasedStateMachine):
    """What every order that was ever given has to agree with."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp(prefix="boreal-control-"))
        self.directories = (self.scratch / str(n) for n in itertools.count())
        self.directory = next(self.directories)
        self.directory.mkdir()
        self.now = 1000.0
        self.volumes = (VolumeId(f"vol-{n}") for n in itertools.count())
        self.lives = (f"life-{n}" for n in itertools.count())
        self.incarnation: dict[InstanceName, str] = {}
        self.orders: dict[InstanceName, Order] = {}
        self.writer_of: dict[Epoch, str] = {}
        self.epoch_of: dict[str, Epoch] = {}
        self.creator_of: dict[VolumeId, str] = {}
        self.ready: VolumeId | None = None
        self.open()

    def open(self) -> None:
        self.state = FragileState.open(self.directory / "control.db")
        self.coordinator = Coordinator(self.state, lambda: self.now, lambda: next(self.volumes))

    def kill(self) -> None:
        after = next(self.directories)
        shutil.copytree(self.directory, after)  # before close(), which would tidy up
        self.state.close()
        self.directory = after
        self.open()

    def teardown(self) -> None:
        self.state.close()
        shutil.rmtree(self.scratch)

    @initialize(settled=st.booleans())
    def all_nodes_report(self, settled: bool) -> None:
        """Begin with nothing but nodes, or with two instances of which one writes."""
        self.storage_reports(6)
        if settled:
            first, second = InstanceName("db-1"), InstanceName("db-2")
            self.instance_reports(first, 0)
            self.creation_ends(first)
            self.instance_starts_over(first)
            self.instance_reports(first, 0)
            self.instance_reports(second, 0)
            assert self.orders[first].kind is OrderKind.WRITE
            assert self.orders[second].kind is OrderKind.READ

    @rule(alive=st.integers(0, 6))
    def storage_reports(self, alive: int) -> None:
        try:
            for name in NODES[:alive]:
                self.coordinator.storage_reported(storage_member(name), ())
        except Killed:
            self.kill()

    @rule(name=INSTANCES)
    def instance_starts_over(self, name: InstanceName) -> None:
        self.incarnation[name] = next(self.lives)
        self.orders.pop(name, None)

    @rule(name=INSTANCES, replay=st.integers(0, 3))
    def instance_reports(self, name: InstanceName, replay: int) -> None:
        incarnation = self.incarnation.setdefault(name, next(self.lives))
        member = InstanceMember(name=name, address=f"{name}:1", postgres_port=1)
        order = self.orders.get(name)
        report = InstanceReport(
            incarnation=incarnation, state=self.doing(order), replay=Lsn(replay)
        )
        try:
            order = self.coordinator.instance_reported(member, report)
        except Killed:
            self.kill()
            return
        self.orders[name] = order
        self.check(incarnation, order)

    @staticmethod
    def doing(order: Order | None) -> InstanceState:
        kind = order.kind if order else OrderKind.WAIT
        return {
            OrderKind.WAIT: InstanceState.WAITING,
            OrderKind.CREATE_VOLUME: InstanceState.CREATING,
            OrderKind.READ: InstanceState.READER,
            OrderKind.WRITE: InstanceState.WRITER,
        }[kind]

    def check(self, incarnation: str, order: Order) -> None:
        if order.kind is OrderKind.WRITE:
            assert order.epoch is not None
            assert order.volume == self.ready
            assert self.writer_of.setdefault(order.epoch, incarnation) == incarnation
            assert self.epoch_of.setdefault(incarnation, order.epoch) == order.epoch
            assert order.epoch == max(self.writer_of)
        if order.kind is OrderKind.CREATE_VOLUME:
            assert order.volume is not None
            assert self.ready is None
            assert self.creator_of.setdefault(order.volume, incarnation) == incarnation

    @rule(name=INSTANCES)
    def creation_ends(self, name: InstanceName) -> None:
        order = self.orders.get(name)
        if order is None or order.kind is not OrderKind.CREATE_VOLUME or order.volume is None:
            return
        try:
            self.coordinator.volume_created(order.volume, 2**63 + 1)
        except Killed:
            self.kill()
            if self.state.current.volume != order.volume:
                return
        except Refused:
            assert self.state.current.volume != order.volume
            return
        assert self.ready in {None, order.volume}
        self.ready = order.volume

    @rule(seconds=st.sampled_from([0.3, 1.9, 2.5, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.orders)
    @rule()
    def control_plane_is_killed(self) -> None:
        before = self.state.current
        self.kill()
        assert self.state.current == before

    @rule(moment=st.sampled_from(["before", "after", ""]))
    def control_plane_will_be_killed(self, moment: str) -> None:
        self.state.die_at(moment)

    @invariant()
    def the_ready_volume_stays(self) -> None:
        assert self.state.current.volume == self.ready

    @invariant()
    def allocated_epochs_are_as_ordered(self) -> None:
        allocated = {
            epoch: incarnation
            for (_, incarnation), epoch in self.state.current.appointments.items()
        }
        assert len(allocated) == len(self.state.current.appointments)
        assert self.writer_of.items() <= allocated.items()


TestControlPlaneLife = ControlPlaneLife.TestCase
TestControlPlaneLife.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, print_blob=True
)
