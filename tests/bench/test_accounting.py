"""Goal: no CPU time is lost, counted twice or booked wrongly, whatever begins or ends meanwhile.

Method: process tables made by hand; then real processes of this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.accounting import (
    Kind,
    Process,
    ProcessId,
    Tree,
    attribute,
    process_table,
    spent,
    standby_kind,
    writer_kind,
)

PRIMARY = Tree(root_pid=10, root_kind=Kind.POSTGRES, child_kind=writer_kind)


def process(
    pid: int, parent: int, title: str, own_s: float, *, reaped_s: float = 0, started: float = 0
) -> Process:
    return Process(
        id=ProcessId(pid, started), parent_pid=parent, title=title, own_s=own_s, reaped_s=reaped_s
    )


def between(before: list[Process], after: list[Process], *trees: Tree) -> dict[Kind, float]:
    return spent(attribute(before, trees), attribute(after, trees))


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("/opt/pg/bin/postgres -D /data", Kind.POSTGRES),
        ("postgres: checkpointer ", Kind.POSTGRES),
        ("postgres: db-1: walwriter ", Kind.POSTGRES),
        ("postgres: autovacuum worker postgres", Kind.POSTGRES),
        ("postgres: logical replication launcher ", Kind.POSTGRES),
        ("postgres: walsender postgres 127.0.0.1(4711) streaming 0/3000060", Kind.WALSENDER),
        ("postgres: db-1: walsender boreal_admin [local] streaming 0/30", Kind.WALSENDER),
        ("postgres: postgres postgres 127.0.0.1(4712) COMMIT", Kind.BACKENDS),
        ("postgres: db-1: boreal postgres 127.0.0.1(4712) idle", Kind.BACKENDS),
    ],
)
def test_kinds_of_a_primary(title: str, kind: Kind) -> None:
    assert writer_kind(title) is kind


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("postgres: walreceiver streaming 0/3000060", Kind.RECEIVE),
        ("postgres: startup recovering 000000010000000000000003", Kind.REPLAY),
        ("postgres: checkpointer ", Kind.STANDBY),
        ("/opt/pg/bin/postgres -D /data", Kind.STANDBY),
    ],
)
def test_kinds_of_a_standby(title: str, kind: Kind) -> None:
    assert standby_kind(title) is kind


def test_living_processes() -> None:
    before = [process(10, 1, "postgres", 1), process(11, 10, "postgres: walsender x", 5)]
    after = [process(10, 1, "postgres", 1.5), process(11, 10, "postgres: walsender x", 7)]
    assert between(before, after, PRIMARY) == {
        Kind.BACKENDS: 0,
        Kind.WALSENDER: 2,
        Kind.POSTGRES: 0.5,
    }


def test_backends_that_began_and_ended_in_between() -> None:
    before = [process(10, 1, "postgres", 1, reaped_s=3)]
    after = [process(10, 1, "postgres", 1, reaped_s=8)]
    assert between(before, after, PRIMARY)[Kind.BACKENDS] == 5


def test_what_a_process_used_before_is_not_counted_when_it_ends() -> None:
    before = [process(10, 1, "postgres", 1), process(11, 10, "postgres: walsender x", 5)]
    after = [process(10, 1, "postgres", 1, reaped_s=6)]
    figures = between(before, after, PRIMARY)
    assert sum(figures.values()) == 1
    assert figures[Kind.BACKENDS] == 1


def test_a_pid_used_again_is_another_process() -> None:
    before = [process(10, 1, "postgres", 9, started=100)]
    after = [process(10, 1, "postgres", 2, started=200)]
    assert between(before, after, PRIMARY)[Kind.POSTGRES] == 2


def test_a_tree_of_several_levels() -> None:
    agent = Tree(root_pid=5, root_kind=Kind.AGENT, child_kind=writer_kind)
    after = [
        process(5, 1, "python -m compute_node", 4, reaped_s=0.5),
        process(6, 5, "postgres -D x", 1, reaped_s=2),
        process(7, 6, "postgres: db-1: walsender x", 3),
        process(8, 1, "postgres: of somebody else", 99),
    ]
    assert between([], after, agent) == {
        Kind.BACKENDS: 2,
        Kind.WALSENDER: 3,
        Kind.POSTGRES: 1.5,
        Kind.AGENT: 4,
    }


def test_a_tree_whose_root_is_gone_is_empty() -> None:
    assert attribute([process(11, 10, "x", 1)], [PRIMARY]) == {}


def test_real_time_of_a_child_that_ended() -> None:
    tree = Tree(root_pid=os.getpid(), root_kind=Kind.AGENT, child_kind=lambda _: Kind.BACKENDS)
    before = attribute(process_table(), [tree])
    program = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    figures = spent(before, attribute(process_table(), [tree]))
    assert 0.25 < figures[Kind.POSTGRES] < 3  # what an agent's ended children are booked as
