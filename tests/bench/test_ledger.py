"""Goal: what must hold across failovers is judged right, and clients note what they were told.

Method: acknowledgements and looks made by hand, one fault of each kind among them; the clients
against a stock PostgreSQL that is frozen, killed and started again.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from bench.ledger import (
    SCHEMA,
    Ack,
    LedgerClient,
    Sight,
    Watcher,
    longest_gap_s,
    lost,
    out_of_order,
    shared_timelines,
    stale,
)
from bench.session import Session
from boreal.errors import EngineError, UnknownOutcome, Unreachable
from boreal.types import Lsn
from boreal.waiting import wait_until
from tests.support.stock_postgres import StockPostgres, stock_postgres


def ack(number: int, *, client: int = 0, timeline: int = 1, writer: str = "db-1") -> Ack:
    """One a second; the commit takes half of it."""
    return Ack(
        client=client,
        number=number,
        sent_s=float(number),
        acked_s=number + 0.5,
        writer=writer,
        timeline=timeline,
        lsn=Lsn(1000 * number),
    )


def sight(newest: int, sent_s: float) -> Sight:
    return Sight(instance="db-1", client=0, newest=newest, sent_s=sent_s, answered_s=sent_s + 9)


FAILOVER = [*(ack(n) for n in (1, 2, 3)), *(ack(n, timeline=2, writer="db-2") for n in (7, 8))]


def test_a_failover_in_order() -> None:
    assert out_of_order(FAILOVER) == []
    assert shared_timelines(FAILOVER) == {}
    assert lost(FAILOVER, {(0, n) for n in range(1, 9)}) == []
    assert longest_gap_s(FAILOVER, 3.2) == 4.0
    assert longest_gap_s(FAILOVER, 7.6) == 1.0
    assert longest_gap_s(FAILOVER[:1], 0) == 0


def test_a_lost_row() -> None:
    assert lost(FAILOVER, {(0, 1), (0, 3), (0, 7), (0, 8), (1, 2)}) == [FAILOVER[1]]


def test_two_writers_at_once() -> None:
    deposed = replace(ack(9, client=1), lsn=Lsn(10**9))
    assert out_of_order([*FAILOVER, deposed]) == [(FAILOVER[-1], deposed)]


def test_a_log_that_went_back() -> None:
    again = replace(ack(9, timeline=2, writer="db-2"), lsn=Lsn(7500))
    assert out_of_order([*FAILOVER, again]) == [(FAILOVER[-1], again)]


def test_an_answer_that_was_long_under_way_is_no_fault() -> None:
    late = replace(ack(3, client=1), acked_s=20.0)
    assert out_of_order([*FAILOVER, late]) == []


def test_two_instances_on_one_timeline() -> None:
    odd = ack(9, timeline=2, writer="db-3")
    assert shared_timelines([*FAILOVER, odd]) == {2: {"db-2", "db-3"}}


def test_a_deposed_writer_that_goes_on_showing_what_it_has() -> None:
    fresh, old = sight(3, sent_s=7.4), sight(3, sent_s=7.6)
    assert stale([fresh, old, sight(7, 7.7), sight(8, 8.6)], FAILOVER) == [(old, FAILOVER[3])]


# --- clients -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres() -> Iterator[StockPostgres]:
    with stock_postgres() as server:
        server.run(
            "create function aurora_db_instance_identifier() returns text language sql return 'me'"
        )
        with server.connect() as session:
            session.execute(SCHEMA.encode())
        yield server


def dsn(postgres: StockPostgres) -> str:
    return f"host={postgres.socket_directory} port=5432 user=postgres dbname=postgres"


def everybody(postgres: StockPostgres) -> list[psutil.Process]:
    postmaster = psutil.Process(postgres.pid)
    return [postmaster, *postmaster.children()]


def test_a_session_answers_and_refuses(postgres: StockPostgres) -> None:
    with Session(dsn(postgres), patience_s=5) as session:
        assert session.query("select $1 || 'b', null, 1", "a") == [("ab", None, "1")]
        assert session.query("set work_mem = '8MB'") == []
        with pytest.raises(EngineError) as refused:
            session.query("select * from nowhere")
        assert refused.value.sqlstate == "42P01"
        assert len(session.query("select repeat('x', 100), n from generate_series(1, 9999) n")) == (
            9999
        )


def test_a_session_does_not_wait_for_ever(postgres: StockPostgres) -> None:
    with (
        Session(dsn(postgres), patience_s=0.2) as session,
        pytest.raises(UnknownOutcome, match=r"nothing for 0\.2 s"),
    ):
        session.query("select pg_sleep(60)")
    with pytest.raises(Unreachable):
        Session("host=127.0.0.1 port=1 user=nobody", patience_s=5)
    frozen = everybody(postgres)
    for process in frozen:
        process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(Unreachable, match=r"nothing for 0\.2 s"):
            Session(dsn(postgres), patience_s=0.2)
    finally:
        for process in reversed(frozen):
            process.send_signal(signal.SIGCONT)


def test_clients_go_on_after_a_freeze_and_a_crash(postgres: StockPostgres) -> None:
    with (
        LedgerClient(dsn(postgres), 7, patience_s=0.2) as client,
        Watcher(dsn(postgres), "me", 7, patience_s=5, pause_s=0.001) as watcher,
    ):
        assert client.wait_for(lambda each: each.number >= 5, 30)
        frozen = everybody(postgres)
        for process in frozen:
            process.send_signal(signal.SIGSTOP)
        wait_until(
            lambda: client.failures,
            timeout_s=30,
            otherwise=lambda: AssertionError("it never gave up"),
        )
        for process in reversed(frozen):
            process.send_signal(signal.SIGCONT)
        reached = len(client.acks)
        assert client.wait_for(lambda each: each.number > reached, 30)
        postgres.stop(signal.SIGQUIT)
        postgres.start()
        assert client.wait_for(lambda each: each.number > reached, 30)
        seen = len(watcher.sights)
        wait_until(
            lambda: len(watcher.sights) > seen,
            timeout_s=30,
            otherwise=lambda: AssertionError("the watcher sees no more"),
        )
    rows = {
        (int(client), int(n)) for client, n in postgres.run("select client, number from ledger")
    }
    acked = {(each.client, each.number) for each in client.acks}
    assert lost(client.acks, rows) == []
    assert rows - acked <= {(7, number) for number in client.unknown}
    assert out_of_order(client.acks) == []
    assert stale(watcher.sights, client.acks) == []
    assert {each.writer for each in client.acks} == {"me"}
    assert client.first_failures
