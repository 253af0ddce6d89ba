"""The coordinator with its store: whatever happens and wherever it is cut off, promises hold.

Method: a simulated cluster (simulated.py) played at random by hypothesis; and scripted failovers in
which the control plane is killed before and after every single commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from boreal.errors import BadUsage, MalformedRequest, NotNow, Refused
from boreal.types import InstanceName, Lsn, VolumeId
from control_plane.coordinator import MAX_INSTANCES
from control_plane.events import EventKind
from control_plane.presence import AttentiveClock
from control_plane.roll import InstanceReport
from control_plane.state import InstanceMember
from control_plane.view import InstanceState, OrderKind
from tests.control_plane.simulated import Agent, SimulatedCluster

NAMES = [InstanceName(f"db-{n}") for n in (1, 2, 3)]
INSTANCES = st.sampled_from(NAMES)


# --- at random -----------------------------------------------------------------------------------


class ControlPlaneLife(RuleBasedStateMachine):
    """Anything may happen at any time; in the end all comes to rest."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = SimulatedCluster()
        self.ready: VolumeId | None = None

    def teardown(self) -> None:
        try:
            if self.cluster.agents:
                self.cluster.state.die_at(-1, before=False)
                self.cluster.recover()
        finally:
            self.cluster.close()

    def agent(self, name: InstanceName) -> Agent:
        return self.cluster.agents[name]

    @initialize(settled=st.booleans(), tiers=st.tuples(*[st.integers(0, 2)] * 3))
    def begin(self, settled: bool, tiers: tuple[int, ...]) -> None:
        """Begin with nothing, or with three instances of which one writes."""
        for name, tier in zip(NAMES, tiers, strict=True):
            self.cluster.add(name, tier)
        if settled:
            self.cluster.recover()

    @rule(alive=st.sampled_from([6, 6, 5, 4, 3, 0]))
    def storage_changes(self, alive: int) -> None:
        self.cluster.nodes_alive = alive

    @rule(name=INSTANCES)
    def reports(self, name: InstanceName) -> None:
        self.cluster.report(self.agent(name))

    @rule(replay=st.integers(1, 3), name=INSTANCES)
    def replays(self, name: InstanceName, replay: int) -> None:
        self.agent(name).replay += replay

    @rule()
    def everybody_reports(self) -> None:
        for agent in self.cluster.agents.values():
            self.cluster.report(agent)

    @rule(name=INSTANCES)
    def postgres_dies(self, name: InstanceName) -> None:
        self.cluster.postgres_dies(self.agent(name))

    @rule(name=INSTANCES)
    def agent_dies(self, name: InstanceName) -> None:
        self.cluster.agent_dies(self.agent(name))

    @rule(name=INSTANCES)
    def agent_starts(self, name: InstanceName) -> None:
        self.cluster.agent_starts(self.agent(name))

    @rule(name=INSTANCES)
    def freezes_or_thaws(self, name: InstanceName) -> None:
        self.agent(name).frozen = not self.agent(name).frozen

    @rule(to=st.none() | INSTANCES)
    def failover_is_asked_for(self, to: InstanceName | None) -> None:
        def ask() -> None:
            try:
                self.cluster.coordinator.begin_failover(to)
            except (BadUsage, NotNow):
                return

        self.cluster.surviving(ask)

    @rule(name=INSTANCES)
    def removal_is_asked_for(self, name: InstanceName) -> None:
        def ask() -> None:
            try:
                self.cluster.coordinator.remove_instance(name)
            except BadUsage:
                return

        self.cluster.surviving(ask)

    @rule(seconds=st.sampled_from([0.1, 0.3, 0.5, 1.9, 2.5, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.cluster.pass_time(seconds)

    @rule()
    def control_plane_is_killed(self) -> None:
        before = self.cluster.state.current
        self.cluster.kill_control()
        assert self.cluster.state.current == before

    @rule(survives=st.integers(0, 4), before=st.booleans())
    def control_plane_will_be_killed(self, survives: int, before: bool) -> None:
        self.cluster.state.die_at(survives, before=before)

    @rule()
    def nothing_goes_wrong_for_a_while(self) -> None:
        self.cluster.state.die_at(-1, before=False)
        self.cluster.recover()

    @invariant()
    def the_ready_volume_stays(self) -> None:
        volume = self.cluster.state.current.volume
        assert self.ready in {None, volume}
        self.ready = volume

    @invariant()
    def the_store_agrees(self) -> None:
        self.cluster.check_store()


TestControlPlaneLife = ControlPlaneLife.TestCase
TestControlPlaneLife.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, print_blob=True
)


# --- scripted, killed at every step --------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[SimulatedCluster]:
    cluster = SimulatedCluster()
    yield cluster
    cluster.close()


def settled_cluster() -> SimulatedCluster:
    cluster = SimulatedCluster()
    for name in NAMES:
        cluster.add(name)
    cluster.recover()
    return cluster


def agent_killed(cluster: SimulatedCluster) -> None:
    cluster.agent_dies(cluster.agents[NAMES[0]])
    cluster.pass_time(0.5)


def postgres_killed(cluster: SimulatedCluster) -> None:
    cluster.postgres_dies(cluster.agents[NAMES[0]])


def frozen(cluster: SimulatedCluster) -> None:
    cluster.agents[NAMES[0]].frozen = True
    for _ in range(8):
        cluster.pass_time(0.3)
        for agent in cluster.agents.values():
            cluster.report(agent)


def planned(cluster: SimulatedCluster) -> None:
    cluster.surviving(lambda: ask(cluster, NAMES[2]))


def planned_and_target_dies(cluster: SimulatedCluster) -> None:
    planned(cluster)
    cluster.report(cluster.agents[NAMES[0]])  # it begins to yield
    cluster.agent_dies(cluster.agents[NAMES[2]])
    cluster.pass_time(0.5)


def planned_and_writer_dies(cluster: SimulatedCluster) -> None:
    planned(cluster)
    agent_killed(cluster)


def successor_dies_too(cluster: SimulatedCluster) -> None:
    agent_killed(cluster)
    for agent in cluster.agents.values():
        cluster.report(agent)
    writer = cluster.state.current.writer
    assert writer is not None
    cluster.postgres_dies(cluster.agents[writer.instance])


def ask(cluster: SimulatedCluster, target: InstanceName) -> None:
    cluster.coordinator.begin_failover(target)


def play(script: Callable[[SimulatedCluster], None], survives: int, *, before: bool) -> int:
    """Play the script in a cluster whose control plane dies so; return its commits till rest.

    However it is cut: a failover that began has ended, and somebody serves.
    """
    cluster = settled_cluster()
    try:
        first = cluster.state
        began = first.commits
        first.die_at(survives, before=before)
        script(cluster)
        for _ in range(20):
            cluster.pass_time(0.3)
            for agent in cluster.agents.values():
                cluster.report(agent)
        cluster.recover()
        cluster.check_store()
        writer = cluster.state.current.writer
        assert writer is not None
        if script is planned:  # what was asked for comes about, once it is durable
            began_one = EventKind.FAILOVER_STARTED in kinds(cluster)
            assert writer.instance == (NAMES[2] if began_one else NAMES[0])
        elif script is not planned_and_target_dies:
            assert writer.epoch >= 3
        assert survives < 0 or cluster.state is not first
        return first.commits - began
    finally:
        cluster.close()


SCRIPTS = [
    agent_killed,
    postgres_killed,
    frozen,
    planned,
    planned_and_target_dies,
    planned_and_writer_dies,
    successor_dies_too,
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_failover_survives_a_control_plane_killed_at_any_step(
    script: Callable[[SimulatedCluster], None],
) -> None:
    commits = play(script, -1, before=False)
    assert commits >= 2
    for step in range(commits):
        for before in (True, False):
            play(script, step, before=before)


# --- one by one ----------------------------------------------------------------------------------


def kinds(cluster: SimulatedCluster) -> list[EventKind]:
    return [event.kind for event in cluster.state.events_after(0)]


def rounds(cluster: SimulatedCluster, count: int) -> None:
    for _ in range(count):
        cluster.pass_time(0.3)
        for agent in cluster.agents.values():
            cluster.report(agent)


def test_a_single_instance_comes_back_by_itself(cluster: SimulatedCluster) -> None:
    only = cluster.add("db-1")
    cluster.recover()
    only.frozen = True
    cluster.pass_time(60)
    assert cluster.coordinator.order(only.name).kind is OrderKind.WRITE
    only.frozen = False
    cluster.report(only)
    assert only.state is InstanceState.WRITER
    cluster.postgres_dies(only)
    cluster.recover()
    writer = cluster.state.current.writer
    assert writer is not None
    assert writer.epoch == 3
    assert kinds(cluster) == [
        EventKind.INSTANCE_ADDED,
        EventKind.VOLUME_CREATED,
        EventKind.INSTANCE_LOST,
        EventKind.INSTANCE_RESTARTED,
        EventKind.INSTANCE_RESTARTED,
    ]


def test_a_cut_call_counts_soon_unless_another_follows(cluster: SimulatedCluster) -> None:
    first, second = cluster.add("db-1"), cluster.add("db-2")
    cluster.recover()
    cluster.coordinator.instance_cut(first.name, first.call)
    cluster.report(first)
    cluster.pass_time(0.5)
    assert cluster.coordinator.order(first.name).kind is OrderKind.WRITE
    late = first.call
    cluster.report(first)
    cluster.coordinator.instance_cut(first.name, late)
    cluster.pass_time(0.5)
    assert cluster.coordinator.order(first.name).kind is OrderKind.WRITE
    cluster.coordinator.instance_cut(first.name, first.call)
    cluster.pass_time(0.3)
    assert cluster.coordinator.order(first.name).kind is OrderKind.WRITE
    cluster.pass_time(0.2)
    order = cluster.coordinator.order(second.name)
    assert (order.kind, order.epoch, order.former_gone) == (OrderKind.WRITE, 3, False)
    cluster.agent_dies(first)
    cluster.agent_starts(first)
    cluster.report(first)
    assert cluster.coordinator.order(second.name).former_gone


def test_a_planned_failover_is_told_of_from_begin_to_end(cluster: SimulatedCluster) -> None:
    for name, tier in zip(NAMES, (0, 5, 3), strict=True):
        cluster.add(name, tier)
    cluster.recover()
    started = cluster.coordinator.begin_failover(None)
    assert (started.kind, started.instance) == (EventKind.FAILOVER_STARTED, "db-3")
    # From here on clients wait for the next writer rather than find one that is about to end.
    assert [route.writer for route in cluster.coordinator.outlook.routes] == [False, False]
    with pytest.raises(NotNow, match="under way"):
        cluster.coordinator.begin_failover(NAMES[1])
    rounds(cluster, 8)
    (end,) = cluster.state.events_after(started.id)
    assert (end.kind, end.instance, end.epoch) == (EventKind.FAILOVER_COMPLETED, "db-3", 3)
    assert 0 < end.took_ms < 3000
    assert cluster.settled()


def test_what_a_failover_cannot_go_to(cluster: SimulatedCluster) -> None:
    for name in NAMES:
        cluster.add(name)
    with pytest.raises(NotNow, match="no writer yet"):
        cluster.coordinator.begin_failover(None)
    cluster.recover()
    for target, why in (("db-9", "not part"), ("db-1", "the writer already")):
        with pytest.raises(BadUsage, match=why):
            cluster.coordinator.begin_failover(InstanceName(target))
    cluster.agent_dies(cluster.agents[NAMES[1]])
    rounds(cluster, 2)
    with pytest.raises(BadUsage, match="does not report"):
        cluster.coordinator.begin_failover(NAMES[1])
    cluster.postgres_dies(cluster.agents[NAMES[2]])
    cluster.report(cluster.agents[NAMES[2]])
    with pytest.raises(BadUsage, match="not a reader"):
        cluster.coordinator.begin_failover(NAMES[2])
    with pytest.raises(BadUsage, match="add-reader"):
        cluster.coordinator.begin_failover(None)
    rounds(cluster, 3)
    cluster.nodes_alive = 3
    rounds(cluster, 10)
    with pytest.raises(NotNow, match="3 of 6"):
        cluster.coordinator.begin_failover(NAMES[2])


def test_a_writer_that_does_not_yield_is_fenced_by_the_target(cluster: SimulatedCluster) -> None:
    for name in NAMES[:2]:
        cluster.add(name)
    cluster.recover()
    cluster.coordinator.begin_failover(NAMES[1])
    stubborn, target = (cluster.agents[name] for name in NAMES[:2])
    for _ in range(20):
        cluster.pass_time(0.3)
        cluster.surviving(lambda: cluster._call(stubborn))  # reports, but does not obey
        cluster.report(target)
    assert target.state is InstanceState.WRITER
    assert cluster.coordinator.order(stubborn.name).kind is OrderKind.READ


def test_a_removed_instance_is_forgotten(cluster: SimulatedCluster) -> None:
    for name in NAMES[:2]:
        cluster.add(name)
    cluster.recover()
    for unfit, why in (("db-9", "no instance"), ("db-1", "the writer"), ("db-2", "alive")):
        with pytest.raises(BadUsage, match=why):
            cluster.coordinator.remove_instance(InstanceName(unfit))
    reader = cluster.agents.pop(NAMES[1])
    reader.state = InstanceState.STOPPING
    cluster.report(reader)
    cluster.agent_dies(reader)
    rounds(cluster, 2)
    cluster.coordinator.remove_instance(NAMES[1])
    assert set(cluster.state.current.instances) == {NAMES[0]}
    assert kinds(cluster)[-1] is EventKind.INSTANCE_REMOVED
    assert EventKind.INSTANCE_LOST not in kinds(cluster)
    cluster.kill_control()
    rounds(cluster, 1)
    assert cluster.settled()


def test_a_loss_is_told_once_even_by_the_next_control_plane(cluster: SimulatedCluster) -> None:
    for name in NAMES[:2]:
        cluster.add(name)
    cluster.recover()
    cluster.agent_dies(cluster.agents[NAMES[1]])
    rounds(cluster, 5)
    cluster.kill_control()
    rounds(cluster, 15)
    assert kinds(cluster).count(EventKind.INSTANCE_LOST) == 1
    cluster.agent_starts(cluster.agents[NAMES[1]])
    rounds(cluster, 3)
    assert kinds(cluster)[-1] is EventKind.INSTANCE_RESTARTED


def test_a_restarted_control_plane_says_nothing_of_routes_it_cannot_know(
    cluster: SimulatedCluster,
) -> None:
    for name in NAMES:
        cluster.add(name)
    cluster.recover()
    cluster.agent_dies(cluster.agents[NAMES[1]])
    cluster.kill_control()
    rounds(cluster, 1)
    assert not cluster.coordinator.outlook.informed
    rounds(cluster, 12)
    assert cluster.coordinator.outlook.informed
    assert [route.instance for route in cluster.coordinator.outlook.routes] == ["db-1", "db-3"]


def test_reports_that_cannot_be(cluster: SimulatedCluster) -> None:
    agent = cluster.add("db-1")
    cluster.report(agent)
    former = agent.incarnation
    cluster.postgres_dies(agent)
    cluster.report(agent)
    agent.incarnation = former
    with pytest.raises(Refused, match="another incarnation"):
        cluster.report(agent)

    def report(name: str, tier: int) -> None:
        cluster.coordinator.instance_reported(
            InstanceMember(name=InstanceName(name), address="h:1", postgres_port=1),
            InstanceReport(incarnation="x", state=InstanceState.WAITING, replay=Lsn(0), tier=tier),
        )

    with pytest.raises(MalformedRequest, match="tier 16"):
        report("db-2", 16)
    for number in range(2, MAX_INSTANCES + 1):
        report(f"db-{number}", 15)
    with pytest.raises(BadUsage, match="16 instances"):
        report("db-17", 1)


def test_an_instance_whose_creation_was_given_up_reads_what_another_made(
    cluster: SimulatedCluster,
) -> None:
    """Found at random: silent for so long that another was asked, and then back at work."""
    first, second, _ = (cluster.add(name) for name in NAMES)
    cluster.pass_time(0.1)
    cluster.report(first)
    cluster.pass_time(1.9)
    cluster.report(second)
    cluster.recover()
    assert cluster.state.current.volume == VolumeId("vol-1")


def test_time_in_which_nobody_looked_hardly_counts() -> None:
    now = [100.0]
    clock = AttentiveClock(lambda: now[0], longest_s=0.2)
    for step, expected in ((0.1, 0.1), (0.15, 0.25), (30.0, 0.45), (0.05, 0.5)):
        now[0] += step
        assert clock() == pytest.approx(expected)
