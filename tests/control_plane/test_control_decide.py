"""The control plane's rules, over generated situations.

Method: hypothesis builds cluster views, likely and unlikely ones, and each rule of decide.py is
checked on what `decide` and `order_for` answer.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from boreal.types import Epoch, InstanceName, Lsn, NodeName, VolumeId
from control_plane.decide import (
    CREATION_EPOCH,
    Appointment,
    AppointWriter,
    BeginCreation,
    ClusterView,
    Creation,
    InstanceState,
    InstanceView,
    OrderKind,
    StorageView,
    decide,
    order_for,
)

VOLUME = VolumeId("vol-1")
NAMES = [InstanceName(f"db-{n}") for n in (1, 2, 3)]
INCARNATIONS = ["x", "y", "z"]

epochs = st.integers(2, 9).map(Epoch)
instances = st.builds(
    InstanceView,
    name=st.sampled_from(NAMES),
    incarnation=st.sampled_from([None, *INCARNATIONS]),
    state=st.sampled_from(InstanceState),
    lost=st.booleans(),
    appointed=st.none() | epochs,
    replay=st.integers(0, 3).map(Lsn),
)
promises = st.lists(
    st.tuples(st.sampled_from([VOLUME, VolumeId("vol-2")]), epochs), max_size=2
).map(tuple)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[StorageView, ...]:
    """Some storage nodes; mostly so many alive that something can be decided."""
    count = draw(st.sampled_from([6, 6, 6, 5, 0]))
    dead = draw(st.sampled_from([0, 0, 1, 2, 3]))
    return tuple(
        StorageView(name=NodeName(f"sn-{n + 1}"), alive=n >= dead, promised=draw(promises))
        for n in range(count)
    )


views = st.builds(
    ClusterView,
    storage=fleets(),
    instances=st.lists(instances, unique_by=lambda each: each.name, max_size=3).map(tuple),
    known_volumes=st.sampled_from([frozenset({VOLUME}), frozenset({VOLUME, VolumeId("vol-2")})]),
    creation=st.none()
    | st.builds(
        Creation,
        volume=st.just(VOLUME),
        instance=st.sampled_from(NAMES),
        incarnation=st.sampled_from(INCARNATIONS),
    ),
    volume=st.sampled_from([None, VOLUME]),
    writer=st.none()
    | st.builds(
        Appointment,
        epoch=epochs,
        instance=st.sampled_from(NAMES),
        incarnation=st.sampled_from(INCARNATIONS),
    ),
)


def healthy(*instances: InstanceView, volume: VolumeId | None = VOLUME) -> ClusterView:
    """Six nodes alive, no writer yet."""
    return ClusterView(
        storage=tuple(
            StorageView(name=NodeName(f"sn-{n}"), alive=True, promised=()) for n in range(1, 7)
        ),
        instances=instances,
        known_volumes=frozenset({VOLUME}),
        creation=None,
        volume=volume,
        writer=None,
    )


def instance(name: str = "db-1", incarnation: str = "x") -> InstanceView:
    return InstanceView(
        name=InstanceName(name),
        incarnation=incarnation,
        state=InstanceState.WAITING,
        lost=False,
        appointed=None,
        replay=Lsn(0),
    )


def appointed(view: ClusterView) -> ClusterView:
    """The view once the decision to appoint has been carried out."""
    decision = decide(view)
    assert isinstance(decision, AppointWriter)
    return replace(
        view,
        writer=Appointment(
            epoch=decision.epoch, instance=decision.instance, incarnation=decision.incarnation
        ),
        instances=tuple(
            replace(each, appointed=decision.epoch) if each.name == decision.instance else each
            for each in view.instances
        ),
    )


def alive(view: ClusterView) -> int:
    return sum(node.alive for node in view.storage)


@given(views)
def test_an_appointed_writer_is_fresh_and_its_epoch_the_highest_ever(view: ClusterView) -> None:
    decision = decide(view)
    if not isinstance(decision, AppointWriter):
        return
    chosen = view.instance(decision.instance)
    assert chosen is not None
    assert chosen.available
    assert chosen.appointed is None
    assert chosen.incarnation == decision.incarnation
    assert decision.epoch > max(CREATION_EPOCH, view.writer.epoch if view.writer else 0)
    for node in view.storage:
        for volume, promised in node.promised:
            assert volume != view.volume or decision.epoch > promised
    assert alive(view) >= view.rule.write


@given(views)
def test_a_creation_takes_all_nodes_and_no_lost_state(view: ClusterView) -> None:
    decision = decide(view)
    if not isinstance(decision, BeginCreation):
        return
    assert view.volume is None
    assert alive(view) == view.rule.copies
    held = {volume for node in view.storage for volume, _ in node.promised}
    assert held <= view.known_volumes
    chosen = view.instance(decision.instance)
    assert chosen is not None
    assert chosen.available


@given(views)
def test_a_task_is_not_taken_from_one_that_may_be_at_it(view: ClusterView) -> None:
    holder = view.writer if view.volume else view.creation
    if holder is None:
        return
    at_it = view.instance(holder.instance)
    if at_it and not at_it.lost and at_it.incarnation in {None, holder.incarnation}:
        assert decide(view) is None


@given(views)
def test_orders_rest_on_what_is_durable(view: ClusterView) -> None:
    writers, creators = [], []
    for each in view.instances:
        order = order_for(view, each.name)
        if order.kind is OrderKind.WAIT:
            assert order.reason
            assert order.volume is None
            continue
        assert order.volume == VOLUME
        if order.kind is OrderKind.WRITE:
            assert view.writer is not None
            assert (each.name, each.incarnation) == (view.writer.instance, view.writer.incarnation)
            assert order.epoch == view.writer.epoch
            writers.append(each.name)
        elif order.kind is OrderKind.CREATE_VOLUME:
            assert order.epoch == CREATION_EPOCH
            creators.append(each.name)
        else:
            assert view.volume == VOLUME
    assert len(writers) <= 1
    assert len(creators) <= 1
    assert not (writers and creators)


@given(views)
def test_once_appointed_nothing_more_is_decided(view: ClusterView) -> None:
    if isinstance(decide(view), AppointWriter):
        after = appointed(view)
        assert decide(after) is None
        assert after.writer is not None
        order = order_for(after, after.writer.instance)
        assert (order.kind, order.epoch) == (OrderKind.WRITE, after.writer.epoch)


def test_an_unknown_instance_waits() -> None:
    assert order_for(healthy(), InstanceName("db-9")).kind is OrderKind.WAIT


def test_the_first_writer_has_the_epoch_after_the_creation() -> None:
    view = appointed(healthy(instance()))
    assert view.writer is not None
    assert view.writer.epoch == CREATION_EPOCH + 1


def test_the_reader_furthest_in_replay_takes_over() -> None:
    view = appointed(healthy(instance("db-1")))
    readers = [
        replace(instance(name, "r"), state=InstanceState.READER, replay=Lsn(replay))
        for name, replay in (("db-2", 5), ("db-3", 7))
    ]
    dead = replace(view.instances[0], lost=True)
    decision = decide(replace(view, instances=(dead, *readers)))
    assert isinstance(decision, AppointWriter)
    assert (decision.instance, decision.epoch) == ("db-3", 3)


def test_a_superseded_writer_is_told_to_read_and_not_chosen_again() -> None:
    first = appointed(healthy(instance("db-1")))
    old = replace(first.instances[0], lost=True, state=InstanceState.WRITER)
    second = appointed(replace(first, instances=(old, instance("db-2", "r"))))
    back = replace(second, instances=(replace(old, lost=False), second.instances[1]))
    order = order_for(back, InstanceName("db-1"))
    assert (order.kind, order.epoch) == (OrderKind.READ, 3)
    gone = replace(back.instances[1], lost=True)
    assert decide(replace(back, instances=(back.instances[0], gone))) is None


def test_a_silent_writer_without_rival_keeps_its_order() -> None:
    view = appointed(healthy(instance()))
    silent = replace(view, instances=(replace(view.instances[0], lost=True),))
    assert decide(silent) is None
    assert order_for(silent, NAMES[0]).kind is OrderKind.WRITE


def test_storage_of_an_unknown_volume_stops_a_creation() -> None:
    view = healthy(instance(), volume=None)
    node = replace(view.storage[0], promised=((VolumeId("vol-lost"), Epoch(7)),))
    view = replace(view, storage=(node, *view.storage[1:]))
    assert decide(view) is None
    assert "vol-lost" in order_for(view, NAMES[0]).reason


def test_after_a_restart_the_writer_gets_time_to_report() -> None:
    view = appointed(healthy(instance("db-1")))
    unheard = replace(view.instances[0], incarnation=None, appointed=None)
    restarted = replace(view, instances=(unheard, instance("db-2", "r")))
    assert decide(restarted) is None
    assert order_for(restarted, NAMES[1]).kind is OrderKind.READ
    lost = replace(unheard, lost=True)
    assert isinstance(
        decide(replace(restarted, instances=(lost, restarted.instances[1]))), AppointWriter
    )
