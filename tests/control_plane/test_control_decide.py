"""The control plane's rules, over generated situations.

Method: hypothesis builds cluster views, likely and unlikely ones, and each rule of decide.py is
checked on what `decide` and `order_for` answer.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from boreal.types import Epoch, InstanceName, Lsn, NodeName, VolumeId
from control_plane.decide import decide, order_for, unfit_reason
from control_plane.view import (
    CREATION_EPOCH,
    Appointment,
    AppointWriter,
    BeginCreation,
    Cause,
    ClusterView,
    Creation,
    GiveUpSwitchover,
    InstanceState,
    InstanceView,
    OrderKind,
    Outcome,
    StorageView,
    Switchover,
    WriterServes,
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
    tier=st.integers(0, 2),
    replay=st.integers(0, 3).map(Lsn),
    takes_clients=st.booleans(),
)
appointments = st.builds(
    Appointment,
    epoch=epochs,
    instance=st.sampled_from(NAMES),
    incarnation=st.sampled_from(INCARNATIONS),
    cause=st.sampled_from(Cause),
    outcome=st.sampled_from(Outcome),
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
    writer=st.none() | appointments,
    formers=st.lists(appointments, max_size=2).map(tuple),
    switchover=st.none() | st.builds(Switchover, epoch=epochs, target=st.sampled_from(NAMES)),
    switchover_overdue=st.booleans(),
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
        tier=1,
        replay=Lsn(0),
        takes_clients=False,
    )


def reader(name: str, *, tier: int = 1, replay: int = 0, caught_up: bool = True) -> InstanceView:
    return replace(
        instance(name, f"{name}-r"),
        state=InstanceState.READER,
        tier=tier,
        replay=Lsn(replay),
        takes_clients=caught_up,
    )


def serving(*readers: InstanceView) -> ClusterView:
    """db-1 serves under epoch 2, beside readers."""
    view = appointed(healthy(instance("db-1")))
    assert view.writer is not None
    writer = replace(view.instances[0], state=InstanceState.WRITER, takes_clients=True)
    return replace(
        view,
        instances=(writer, *readers),
        writer=replace(view.writer, outcome=Outcome.SERVED),
    )


def with_writer(view: ClusterView, **changes: object) -> ClusterView:
    """The view with db-1 in another condition."""
    return replace(
        view,
        instances=(replace(view.instances[0], **changes), *view.instances[1:]),  # type: ignore[arg-type]
    )


def switching(view: ClusterView, target: str) -> ClusterView:
    assert view.writer is not None
    return replace(
        view, switchover=Switchover(epoch=view.writer.epoch, target=InstanceName(target))
    )


def appointed(view: ClusterView) -> ClusterView:
    """The view once the decision to appoint has been carried out."""
    decision = decide(view)
    assert isinstance(decision, AppointWriter)
    return replace(
        view,
        writer=Appointment(
            epoch=decision.epoch,
            instance=decision.instance,
            incarnation=decision.incarnation,
            cause=decision.cause,
        ),
        switchover=None,
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
        decision = decide(view)
        assert not isinstance(decision, BeginCreation)
        if isinstance(decision, AppointWriter):
            assert view.switchover is not None
            assert view.switchover_overdue


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
        if order.kind in {OrderKind.WRITE, OrderKind.YIELD}:
            assert (order.kind is OrderKind.YIELD) == (view.switchover is not None)
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
        assert after.writer is not None
        chosen = after.instance(after.writer.instance)
        if chosen is not None and chosen.state is InstanceState.WRITER:
            assert decide(after) == WriterServes(epoch=after.writer.epoch)
        else:
            assert decide(after) is None
        order = order_for(after, after.writer.instance)
        assert (order.kind, order.epoch) == (OrderKind.WRITE, after.writer.epoch)


def test_an_unknown_instance_waits() -> None:
    assert order_for(healthy(), InstanceName("db-9")).kind is OrderKind.WAIT


def test_the_first_writer_has_the_epoch_after_the_creation() -> None:
    view = appointed(healthy(instance()))
    assert view.writer is not None
    assert view.writer.epoch == CREATION_EPOCH + 1


@given(views)
def test_a_silent_writer_is_replaced_by_readers_only(view: ClusterView) -> None:
    decision = decide(view)
    if not isinstance(decision, AppointWriter) or view.writer is None:
        return
    former = view.instance(view.writer.instance)
    gone = former and former.incarnation not in {None, view.writer.incarnation}
    chosen = view.instance(decision.instance)
    assert chosen is not None
    assert gone or chosen.state is InstanceState.READER


@given(views)
def test_a_switchover_ends_with_its_target_or_is_given_up(view: ClusterView) -> None:
    if view.switchover is None or view.volume is None or view.writer is None:
        return
    decision = decide(view)
    unfit = unfit_reason(view, view.switchover.target)
    if isinstance(decision, WriterServes):
        return
    assert isinstance(decision, GiveUpSwitchover) == bool(
        unfit or (view.switchover_overdue and alive(view) < view.rule.write)
    )
    if isinstance(decision, AppointWriter):
        assert decision.instance == view.switchover.target
    target = view.instance(view.switchover.target)
    if view.switchover_overdue and target and target.incarnation:
        assert decision is not None


@given(views)
def test_a_lease_is_only_passed_over_if_nobody_can_hold_it(view: ClusterView) -> None:
    for each in view.instances:
        if order_for(view, each.name).former_gone:
            for former in view.formers:
                now = view.instance(former.instance)
                assert now is not None
                assert now.incarnation not in {None, former.incarnation}


def test_who_takes_over() -> None:
    """Readiness, then the tier, then replay, then the name; the writer itself before it moves."""
    view = with_writer(serving(), incarnation="y", appointed=None, tier=9)
    own = replace(view.instances[0], state=InstanceState.WAITING)
    candidates = [
        own,
        reader("db-5", tier=0, replay=5),
        reader("db-4", tier=1, replay=9),
        reader("db-3", tier=1, replay=7),
        reader("db-6", tier=1, replay=7),
        reader("db-7", tier=0, replay=9, caught_up=False),
        replace(instance("db-2", "w"), tier=0, replay=Lsn(9)),
    ]
    order = []
    for _ in range(len(candidates)):
        decision = decide(replace(view, instances=tuple(reversed(candidates))))
        assert isinstance(decision, AppointWriter)
        assert decision.epoch == 3
        restart = decision.instance == own.name
        assert decision.cause is (Cause.RESTART if restart else Cause.FAILOVER)
        order.append(decision.instance)
        candidates = [
            replace(each, state=InstanceState.STOPPING) if each.name in order else each
            for each in candidates
        ]
    assert order == ["db-5", "db-4", "db-3", "db-6", "db-7", "db-1", "db-2"]


def test_a_failover_that_does_not_come_to_rest_stays_one() -> None:
    view = appointed(with_writer(serving(reader("db-2")), lost=True))
    assert view.writer is not None
    again = replace(view.instances[1], incarnation="db-2-again", appointed=None)
    decision = decide(replace(view, instances=(view.instances[0], again)))
    assert isinstance(decision, AppointWriter)
    assert (decision.instance, decision.cause) == ("db-2", Cause.FAILOVER)


def test_service_is_noted_once() -> None:
    view = appointed(healthy(instance("db-1")))
    writing = with_writer(view, state=InstanceState.WRITER)
    assert decide(writing) == WriterServes(epoch=view.writer.epoch if view.writer else Epoch(0))
    assert decide(serving()) is None


def test_the_former_is_gone_when_all_are_that_may_hold_a_lease() -> None:
    view = serving(reader("db-2"), reader("db-3"))
    assert view.writer is not None
    second = appointed(with_writer(view, lost=True))
    second = replace(second, formers=(view.writer,))
    assert not order_for(second, NAMES[1]).former_gone
    third = appointed(
        replace(
            second,
            instances=(
                second.instances[0],
                replace(second.instances[1], lost=True),
                second.instances[2],
            ),
        )
    )
    assert second.writer is not None
    third = replace(third, formers=(view.writer, second.writer))
    assert not order_for(third, NAMES[2]).former_gone
    # The one that was appointed and never served started over: the one before may still run.
    restarted = replace(third.instances[1], incarnation="again", lost=False)
    half = replace(third, instances=(third.instances[0], restarted, third.instances[2]))
    assert not order_for(half, NAMES[2]).former_gone
    whole = with_writer(half, incarnation="again too", lost=False, appointed=None)
    assert order_for(whole, NAMES[2]).former_gone
    assert decide(whole) is None


def test_a_planned_failover_step_by_step() -> None:
    view = switching(serving(reader("db-2", replay=9), reader("db-3")), "db-3")
    order = order_for(view, NAMES[0])
    assert (order.kind, order.epoch) == (OrderKind.YIELD, 2)
    assert decide(view) is None
    yielding = with_writer(view, state=InstanceState.YIELDING)
    assert decide(yielding) is None
    made_way = with_writer(view, state=InstanceState.WAITING, incarnation="y", appointed=None)
    decision = decide(made_way)
    assert isinstance(decision, AppointWriter)
    assert (decision.instance, decision.cause) == ("db-3", Cause.FAILOVER)
    assert view.writer is not None
    after = replace(appointed(made_way), formers=(view.writer,))
    assert order_for(after, NAMES[2]).former_gone
    assert order_for(after, NAMES[0]).kind is OrderKind.READ


def test_a_writer_that_dies_or_dawdles_while_it_yields_is_followed_by_the_target() -> None:
    view = switching(serving(reader("db-2", replay=9), reader("db-3")), "db-3")
    for stuck in (with_writer(view, lost=True), replace(view, switchover_overdue=True)):
        decision = decide(stuck)
        assert isinstance(decision, AppointWriter)
        assert decision.instance == "db-3"


def test_in_a_switchover_nobody_but_the_target_follows_while_it_may_yet_report() -> None:
    view = switching(serving(reader("db-2"), reader("db-3")), "db-3")
    restarted = replace(
        view,
        instances=(
            replace(view.instances[0], lost=True),
            view.instances[1],
            replace(view.instances[2], incarnation=None),
        ),
    )
    assert decide(restarted) is None


def test_a_switchover_whose_target_is_gone_is_given_up_and_the_best_other_follows() -> None:
    view = switching(serving(reader("db-2"), replace(reader("db-3"), lost=True)), "db-3")
    assert isinstance(decide(view), GiveUpSwitchover)
    back = replace(view, switchover=None)
    assert decide(back) is None
    assert order_for(back, NAMES[0]).kind is OrderKind.WRITE
    made_way = with_writer(back, state=InstanceState.WAITING, incarnation="y", appointed=None)
    decision = decide(made_way)
    assert isinstance(decision, AppointWriter)
    assert decision.instance == "db-2"


def test_the_instance_that_made_the_volume_gets_its_moment() -> None:
    view = replace(
        healthy(instance("db-1"), replace(instance("db-2", "r"), tier=2)),
        maker=Creation(volume=VOLUME, instance=NAMES[0], incarnation="x"),
    )
    assert decide(view) is None
    assert order_for(view, NAMES[1]).kind is OrderKind.WAIT
    for later, chosen in (({"lost": True}, "db-2"), ({"incarnation": "y"}, "db-1")):
        decision = decide(with_writer(view, **later))
        assert isinstance(decision, AppointWriter)
        assert (decision.instance, decision.cause) == (chosen, Cause.FIRST)


def test_whoever_had_an_epoch_or_made_the_volume_is_not_appointed_any_more() -> None:
    view = with_writer(serving(reader("db-2")), incarnation="y", appointed=None, lost=True)
    for spent in (
        replace(
            view, instances=(view.instances[0], replace(view.instances[1], appointed=Epoch(1)))
        ),
        replace(view, maker=Creation(volume=VOLUME, instance=NAMES[1], incarnation="db-2-r")),
    ):
        assert decide(spent) is None
    assert isinstance(decide(view), AppointWriter)


def test_an_instance_that_waits_reads_though_the_writer_is_silent() -> None:
    view = with_writer(serving(instance("db-2", "w")), lost=True)
    assert decide(view) is None  # it could not take over at once
    assert order_for(view, NAMES[1]).kind is OrderKind.READ


def test_a_superseded_writer_is_told_to_read_and_not_chosen_again() -> None:
    first = serving()
    old = replace(first.instances[0], lost=True)
    second = appointed(replace(first, instances=(old, reader("db-2"))))
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
    restarted = replace(view, instances=(unheard, reader("db-2")))
    assert decide(restarted) is None
    assert order_for(restarted, NAMES[1]).kind is OrderKind.READ
    lost = replace(unheard, lost=True)
    assert isinstance(
        decide(replace(restarted, instances=(lost, restarted.instances[1]))), AppointWriter
    )
