"""Goal: a run of failovers is judged right. Method: rounds and acknowledgements made by hand."""

from __future__ import annotations

from bench.faults import Kind
from bench.ledger import Ack, Sight
from bench.rounds import Found, Round, judge, summary
from boreal.types import Lsn

ACKS = [
    Ack(
        client=0,
        number=number,
        sent_s=float(number),
        acked_s=number + 0.5,
        writer=f"db-{timeline}",
        timeline=timeline,
        lsn=Lsn(1000 * number),
    )
    for number, timeline in [(1, 1), (2, 1), (5, 2), (6, 2)]
]
EVERYTHING = {(0, ack.number) for ack in ACKS}


def round_(number: int, kind: Kind, stall_s: float, epoch: int | None = None) -> Round:
    return Round(
        number=number,
        kind=kind,
        old_writer="db-1",
        new_writer="db-2",
        old_epoch=number,
        new_epoch=number + 1 if epoch is None else epoch,
        noticed_s=0.2,
        took_s=0.4,
        stall_s=stall_s,
        returned_s=3.0,
    )


ROUNDS = [
    round_(1, Kind.POSTGRES_KILLED, 1.0),
    round_(2, Kind.FROZEN, 4.0),
    round_(3, Kind.AGENT_KILLED, 2.0),
    round_(4, Kind.PLANNED, 0.5),
]


def test_all_is_well() -> None:
    assert judge(ROUNDS, ACKS, [], {"db-1": EVERYTHING, "db-2": EVERYTHING}) == []
    found = Found(rounds=ROUNDS, acknowledged=len(ACKS))
    assert (found.stalls()["unplanned"].p50_s, found.stalls()["unplanned"].worst_s) == (2.0, 4.0)
    assert found.stalls()[Kind.PLANNED].worst_s == 0.5
    assert Kind.AGENT_FROZEN not in found.stalls()
    assert summary(found)[-1] == "it holds"


def test_each_violation_is_told() -> None:
    behind = Sight(instance="db-1", client=0, newest=2, sent_s=6.0, answered_s=6.1)
    other = Ack(client=1, number=1, sent_s=7, acked_s=8, writer="db-3", timeline=2, lsn=Lsn(4000))
    again = [*ROUNDS, round_(5, Kind.PLANNED, 0.1, epoch=5)]
    said = judge(again, [*ACKS, other], [behind], {"db-2": EVERYTHING, "db-3": {(0, 1), (1, 1)}})
    assert [sentence.split(", as")[0] for sentence in said] == [
        "acknowledged commits missing on db-2: 1",
        "acknowledged commits missing on db-3: 3",
        "commits that contradict the order of others: 1",
        "timelines on which two instances acknowledged: 1",
        "looks at a writer that showed less than was acknowledged: 1",
        "rounds that did not raise the epoch: 1",
    ]
    lines = summary(Found(rounds=again, violations=said))
    assert sum(line.startswith("VIOLATED: ") for line in lines) == 6
    assert lines[-1] == "it does NOT hold"
