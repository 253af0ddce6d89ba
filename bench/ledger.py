"""Clients that write down what they were told, and what that must obey whatever fails.

`LedgerClient` commits row after row and notes each acknowledgement: when it asked, when the answer
came, which instance gave it, on which timeline and at which LSN. `Watcher` reads, on one instance's
own port, the newest row of a client. The functions below judge what they noted; all are pure.

Timelines are PostgreSQL's: each writer that wrote anything has one of its own (ARCHITECTURE.md,
invariant 10).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from bench.session import Session, Value
from boreal.errors import BorealError, EngineError, ProcessFailed, UnknownOutcome, Unreachable
from boreal.types import Lsn, parse_lsn

SCHEMA = """
    create table ledger (
        client int,
        number int,
        writer text not null default aurora_db_instance_identifier(),
        wal text not null default pg_walfile_name(pg_current_wal_insert_lsn()),
        lsn pg_lsn not null default pg_current_wal_insert_lsn(),
        primary key (client, number)
    )
"""
_INSERT = "insert into ledger values ($1, $2) returning writer, wal, lsn"
_NEWEST = "select coalesce(max(number), 0) from ledger where client = $1"

_FIRST_FAILURES = 20
_STOP_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """A commit that was acknowledged. Times are those of the client's monotonic clock."""

    client: int
    number: int
    sent_s: float
    acked_s: float
    writer: str
    timeline: int
    lsn: Lsn
    """Somewhere in the transaction: before its commit record, after whatever was durable before."""

    @property
    def place(self) -> tuple[int, Lsn]:
        """Where in the volume's history it is."""
        return self.timeline, self.lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What an instance that held itself for the writer showed of a client's rows."""

    instance: str
    client: int
    newest: int
    sent_s: float
    answered_s: float


# --- what must hold: pure ------------------------------------------------------------------------


def lost(acks: Iterable[Ack], present: Collection[tuple[int, int]]) -> list[Ack]:
    """Acknowledged rows that are not there."""
    return [ack for ack in acks if (ack.client, ack.number) not in present]


def out_of_order(acks: Iterable[Ack]) -> list[tuple[Ack, Ack]]:
    """Pairs of commits whose places contradict the order in which they happened.

    If one was acknowledged before the other was asked for, it lies before it. With two writers
    acknowledging at the same time, the older one's next commit would not. (An answer of the older
    one that was only long under way contradicts nothing.) Of each offender, one pair.
    """
    by_sent = sorted(acks, key=lambda ack: ack.sent_s)
    by_acked = sorted(by_sent, key=lambda ack: ack.acked_s)
    found = []
    highest, next_acked = None, 0
    for ack in by_sent:
        while next_acked < len(by_acked) and by_acked[next_acked].acked_s < ack.sent_s:
            former = by_acked[next_acked]
            if highest is None or former.place > highest.place:
                highest = former
            next_acked += 1
        if highest is not None and highest.place > ack.place:
            found.append((highest, ack))
    return found


def shared_timelines(acks: Iterable[Ack]) -> dict[int, set[str]]:
    """Timelines on which more than one instance acknowledged."""
    writers: dict[int, set[str]] = {}
    for ack in acks:
        writers.setdefault(ack.timeline, set()).add(ack.writer)
    return {timeline: names for timeline, names in writers.items() if len(names) > 1}


def stale(sights: Iterable[Sight], acks: Iterable[Ack]) -> list[tuple[Sight, Ack]]:
    """Looks at a writer that miss a commit acknowledged before the look was asked for."""
    by_client: dict[int, list[Ack]] = {}
    for ack in sorted(acks, key=lambda each: each.acked_s):
        by_client.setdefault(ack.client, []).append(ack)
    reached = dict.fromkeys(by_client, 0)
    found = []
    for sight in sorted(sights, key=lambda each: each.sent_s):
        known = by_client.get(sight.client, [])
        at = reached.get(sight.client, 0)
        while at < len(known) and known[at].acked_s < sight.sent_s:
            at += 1
        reached[sight.client] = at
        # A client numbers its rows in the order in which it commits them.
        if at and known[at - 1].number > sight.newest:
            found.append((sight, known[at - 1]))
    return found


def longest_gap_s(acks: Sequence[Ack], since_s: float) -> float:
    """The longest wait of one client for its next acknowledgement that ended after `since_s`."""
    times = sorted(ack.acked_s for ack in acks)
    return max(
        (later - former for former, later in pairwise(times) if later >= since_s),
        default=0.0,
    )


# --- clients -------------------------------------------------------------------------------------


class _Worker:
    """A thread that goes on until it is stopped, reconnecting for ever."""

    def __init__(self, name: str, *, patience_s: float, retry_s: float) -> None:
        self._patience_s = patience_s
        self._retry_s = retry_s
        self.failures: Counter[str] = Counter()
        """What ended a session, by SQLSTATE or kind."""
        self.first_failures: list[str] = []
        self.last_failure = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End after the statement under way. May be called twice."""
        self._stopping.set()
        self._thread.join(_STOP_S)
        if self._thread.is_alive():
            raise ProcessFailed(f"{self._thread.name} does not end")

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._session()
            except (UnknownOutcome, Unreachable, EngineError) as error:
                self._note(error)
                self._stopping.wait(self._retry_s)

    def _session(self) -> None:
        raise NotImplementedError

    def _note(self, error: BorealError) -> None:
        kind = error.sqlstate if isinstance(error, EngineError) else error.code
        self.failures[kind] += 1
        self.last_failure = error.message
        if len(self.first_failures) < _FIRST_FAILURES:
            self.first_failures.append(error.message)


class LedgerClient(_Worker):
    """Commits one row after the other, `pause_s` apart, at whoever is the writer."""

    def __init__(
        self, dsn: str, client: int, *, patience_s: float = 1.0, pause_s: float = 0.0
    ) -> None:
        super().__init__(f"ledger client {client}", patience_s=patience_s, retry_s=0.02)
        self._dsn = dsn
        self._client = client
        self._pause_s = pause_s
        self._number = 0
        self.acks: list[Ack] = []
        self.unknown: set[int] = set()
        """Rows whose commit was not acknowledged: they may be there or not."""

    def wait_for(self, condition: Callable[[Ack], bool], timeout_s: float) -> bool:
        """Wait until a new acknowledgement meets `condition`; whether one did in time."""
        deadline, seen = time.monotonic() + timeout_s, len(self.acks)
        while True:
            fresh = self.acks[seen:]
            if any(map(condition, fresh)):
                return True
            if time.monotonic() > deadline:
                return False
            seen += len(fresh)
            time.sleep(0.005)

    def _session(self) -> None:
        with Session(self._dsn, patience_s=self._patience_s) as session:
            while not self._stopping.is_set():
                self._number += 1
                self.unknown.add(self._number)
                sent_s = time.monotonic()
                (row,) = session.query(_INSERT, str(self._client), str(self._number))
                self.acks.append(_ack(self._client, self._number, sent_s, row))
                self.unknown.discard(self._number)
                if self._pause_s:
                    self._stopping.wait(self._pause_s)


def _ack(client: int, number: int, sent_s: float, row: tuple[Value, ...]) -> Ack:
    writer, wal, lsn = map(str, row)
    return Ack(
        client=client,
        number=number,
        sent_s=sent_s,
        acked_s=time.monotonic(),
        writer=writer,
        timeline=int(wal[:8], 16),
        lsn=parse_lsn(lsn),
    )


class Watcher(_Worker):
    """Looks, while an instance holds itself for the writer, for the newest row of a client.

    It keeps its session as long as that lasts: who was connected to a writer that lost its volume
    must not be shown an old state.
    """

    def __init__(
        self, dsn: str, instance: str, client: int, *, patience_s: float, pause_s: float = 0.02
    ) -> None:
        super().__init__(f"watcher of {instance}", patience_s=patience_s, retry_s=0.2)
        self._dsn = dsn
        self._instance = instance
        self._client = client
        self._pause_s = pause_s
        self.sights: list[Sight] = []

    def _session(self) -> None:
        with Session(self._dsn, patience_s=self._patience_s) as session:
            while not self._stopping.wait(self._pause_s):
                if session.query("select pg_is_in_recovery()") == [("t",)]:
                    continue
                sent_s = time.monotonic()
                ((newest,),) = session.query(_NEWEST, str(self._client))
                self.sights.append(
                    Sight(
                        instance=self._instance,
                        client=self._client,
                        newest=int(str(newest)),
                        sent_s=sent_s,
                        answered_s=time.monotonic(),
                    )
                )
