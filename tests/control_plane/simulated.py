"""A simulated cluster around a real coordinator and its real store.

Agents that obey, die, freeze and start over; storage nodes that fall silent; time that passes only
when told to; and a control plane that is killed, at rest or right before or after any commit.
Killed means: its files are copied as they are at that moment, and the next one starts from the
copy. Each order that is given is checked against all that ever happened.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection

from boreal.errors import Refused
from boreal.types import Epoch, InstanceName, Lsn, NodeName, VolumeId
from control_plane.coordinator import Coordinator
from control_plane.events import EventKind
from control_plane.roll import InstanceReport
from control_plane.state import ControlState, InstanceMember, StorageMember
from control_plane.view import Cause, InstanceState, Order, OrderKind, Outcome

NODES = [NodeName(f"sn-{n}") for n in range(1, 7)]
ROUND_S = 0.3
"""What an agent's heartbeat takes at most."""


def storage_member(name: NodeName) -> StorageMember:
    return StorageMember(
        name=name,
        zone="abc"[(int(name[3:]) - 1) // 2],
        log_address=f"{name}:1",
        frames_address=f"{name}:2",
        pages_address=f"{name}:3",
        page_frames_address=f"{name}:4",
    )


class Killed(BaseException):
    """The control plane's process is gone."""


class FragileState(ControlState):
    """A store whose process is killed right before or right after one of its next commits."""

    survives = -1
    """How many commits it lives through before it dies; negative: all."""
    before = False
    commits = 0

    def die_at(self, survives: int, *, before: bool) -> None:
        self.survives, self.before = survives, before

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        if self.survives == 0 and self.before:
            raise Killed
        with super()._transaction() as db:
            yield db
        self.commits += 1
        if self.survives == 0:
            raise Killed
        self.survives -= 1


@dataclass(slots=True)
class Agent:
    """An instance as it really is."""

    name: InstanceName
    tier: int
    incarnation: str
    state: InstanceState = InstanceState.WAITING
    replay: int = 0
    running: bool = True
    frozen: bool = False
    call: int = 0
    order: Order | None = None


class SimulatedCluster:
    """Six storage nodes, up to three instances, and the control plane."""

    def __init__(self) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="boreal-control-"))
        self.directories = (self.scratch / str(n) for n in itertools.count())
        self.directory = next(self.directories)
        self.directory.mkdir()
        self.now = 1000.0
        self.volumes = (VolumeId(f"vol-{n}") for n in itertools.count())
        self.lives = (f"life-{n}" for n in itertools.count())
        self.nodes_alive = 6
        self.agents: dict[InstanceName, Agent] = {}
        self.leases: dict[str, Epoch] = {}
        """Incarnations whose PostgreSQL runs and may still serve clients as the writer."""
        self.writer_of: dict[Epoch, str] = {}
        self.epoch_of: dict[str, Epoch] = {}
        self.creator_of: dict[VolumeId, str] = {}
        self.open()

    def open(self) -> None:
        self.state = FragileState.open(self.directory / "control.db")
        self.coordinator = Coordinator(
            self.state,
            lambda: self.now,
            lambda: next(self.volumes),
            wall_ms=lambda: round(self.now * 1000),
        )

    def kill_control(self) -> None:
        after = next(self.directories)
        shutil.copytree(self.directory, after)  # before close(), which would tidy up
        self.state.close()
        self.directory = after
        self.open()

    def close(self) -> None:
        self.state.close()
        shutil.rmtree(self.scratch)

    def surviving(self, action: Callable[[], None]) -> bool:
        """Do it; if that kills the control plane, start it again. Whether it lived."""
        try:
            action()
        except Killed:
            self.kill_control()
            return False
        return True

    # --- what happens ----------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> None:
        """Time passes; those whose reports come without us telling report."""
        self.now += seconds
        self.surviving(self.nodes_report)
        self.surviving(self.coordinator.tick)

    def nodes_report(self) -> None:
        for name in NODES[: self.nodes_alive]:
            self.coordinator.storage_reported(storage_member(name), ())

    def add(self, name: str, tier: int = 1) -> Agent:
        agent = Agent(name=InstanceName(name), tier=tier, incarnation=next(self.lives))
        return self.agents.setdefault(agent.name, agent)

    def begin_life(self, agent: Agent) -> None:
        """Its PostgreSQL, if any, has ended; the next one begins."""
        self.leases.pop(agent.incarnation, None)
        agent.incarnation = next(self.lives)
        agent.state, agent.order = InstanceState.WAITING, None

    def postgres_dies(self, agent: Agent) -> None:
        if agent.running and not agent.frozen:
            self.begin_life(agent)

    def agent_dies(self, agent: Agent) -> None:
        """The agent is killed; its PostgreSQL goes on by itself for now."""
        agent.running = agent.frozen = False
        self.coordinator.instance_cut(agent.name, agent.call)

    def agent_starts(self, agent: Agent) -> None:
        if not agent.running:
            agent.running = True
            self.begin_life(agent)

    def report(self, agent: Agent) -> None:
        """A heartbeat and what follows from its answer."""
        if not agent.running or agent.frozen:
            return
        self.surviving(lambda: self._call(agent))
        if agent.order:
            self.obey(agent, agent.order)

    def _call(self, agent: Agent) -> None:
        member = InstanceMember(name=agent.name, address=f"{agent.name}:1", postgres_port=1)
        serving = {InstanceState.READER, InstanceState.WRITER}
        report = InstanceReport(
            incarnation=agent.incarnation,
            state=agent.state,
            replay=Lsn(agent.replay),
            tier=agent.tier,
            takes_clients=agent.state in serving,
        )
        agent.call = self.coordinator.instance_reported(member, report)
        agent.order = self.coordinator.order(agent.name)
        self.check(agent, agent.order)

    def obey(self, agent: Agent, order: Order) -> None:
        """Take one step of what it is ordered to do."""
        match order.kind, agent.state:
            case OrderKind.CREATE_VOLUME, InstanceState.WAITING:
                agent.state = InstanceState.CREATING
            case OrderKind.CREATE_VOLUME, InstanceState.CREATING:
                self.surviving(lambda: self.create(agent, order))
            case ((OrderKind.READ | OrderKind.WRITE), InstanceState.WAITING):
                agent.state = InstanceState.RESTORING
            case ((OrderKind.READ | OrderKind.WRITE), InstanceState.RESTORING):
                agent.state = InstanceState.READER
            case OrderKind.WRITE, InstanceState.READER:
                agent.state = InstanceState.PROMOTING
            case OrderKind.WRITE, InstanceState.PROMOTING:
                self.begin_to_serve(agent, order)
            case OrderKind.YIELD, (InstanceState.PROMOTING | InstanceState.WRITER):
                agent.state = InstanceState.YIELDING
            case (
                (OrderKind.WRITE | OrderKind.YIELD | OrderKind.READ),
                InstanceState.YIELDING,
            ):
                self.begin_life(agent)
            case (
                OrderKind.READ,
                (InstanceState.CREATING | InstanceState.PROMOTING | InstanceState.WRITER),
            ):
                self.begin_life(agent)  # another made the volume, or writes it now

    def create(self, agent: Agent, order: Order) -> None:
        assert order.volume is not None
        try:
            self.coordinator.volume_created(order.volume, 2**63 + 1, agent.name)
        except Refused:
            assert self.state.current.volume != order.volume
        self.begin_life(agent)

    def begin_to_serve(self, agent: Agent, order: Order) -> None:
        """It has fenced, recovered, and waited out the leases before its own."""
        assert order.epoch is not None
        if order.epoch != max(self.writer_of):
            return  # fenced by now: it cannot
        agent.state = InstanceState.WRITER
        self.leases = {agent.incarnation: order.epoch}

    # --- what must hold --------------------------------------------------------------------------

    def check(self, agent: Agent, order: Order) -> None:
        durable = self.state.current
        if order.kind in {OrderKind.WRITE, OrderKind.YIELD}:
            assert order.epoch is not None
            assert order.volume == durable.volume
            assert self.writer_of.setdefault(order.epoch, agent.incarnation) == agent.incarnation
            assert self.epoch_of.setdefault(agent.incarnation, order.epoch) == order.epoch
            assert order.epoch == max(self.writer_of)
        if order.former_gone:
            assert order.kind is OrderKind.WRITE
            assert self.leases.keys() <= {agent.incarnation}
        if order.kind is OrderKind.CREATE_VOLUME:
            assert order.volume is not None
            assert durable.volume is None
            assert self.creator_of.setdefault(order.volume, agent.incarnation) == agent.incarnation

    def check_store(self) -> None:
        """What is durable agrees with itself and with every order given."""
        durable = self.state.current
        allocated = {epoch: life for (_, life), epoch in durable.appointments.items()}
        assert len(allocated) == len(durable.appointments)
        assert self.writer_of.items() <= allocated.items()
        told = Counter(event.kind for event in self.state.events_after(0))
        ended = told[EventKind.FAILOVER_COMPLETED] + told[EventKind.FAILOVER_FAILED]
        writer = durable.writer
        taking_over = (
            writer is not None
            and writer.cause is Cause.FAILOVER
            and writer.outcome is Outcome.PENDING
        )
        assert not (taking_over and durable.switchover)
        under_way = taking_over or durable.switchover is not None
        assert told[EventKind.FAILOVER_STARTED] - ended == under_way
        routes = self.coordinator.outlook.routes
        assert sum(route.writer for route in routes) <= 1
        if durable.switchover:
            assert not any(route.writer for route in routes)

    def settled(self) -> bool:
        """One writer serves, the others read, and the control plane knows."""
        durable = self.state.current
        states = Counter(agent.state for agent in self.agents.values())
        return (
            durable.switchover is None
            and durable.writer is not None
            and durable.writer.outcome is Outcome.SERVED
            and states[InstanceState.WRITER] == 1
            and states[InstanceState.READER] == len(self.agents) - 1
            and len(self.coordinator.outlook.routes) == len(self.agents)
        )

    def recover(self, rounds: int = 60) -> None:
        """Nothing goes wrong any more: then all comes to rest, soon."""
        self.nodes_alive = 6
        for agent in self.agents.values():
            agent.frozen = False
            self.agent_starts(agent)
        for _ in range(rounds):
            self.pass_time(ROUND_S)
            for agent in self.agents.values():
                self.report(agent)
            self.check_store()
            if self.settled():
                return
        raise AssertionError(f"no rest: {self.agents}, {self.coordinator.view()}")
