"""A SQL session that never waits longer than it was told to.

A server that is frozen keeps its connections: nothing ever comes over them, and neither TCP nor
libpq finds anything wrong with that. A client that is to measure how long a failover takes must
therefore give up by itself; psycopg can do so neither below two seconds while it connects nor at
all while it waits for an answer.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Self

import psycopg
from psycopg import pq

from boreal.errors import EngineError, UnknownOutcome, Unreachable

Value = str | None
_FINE = frozenset({pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK})


class Session:
    """One connection; values travel as text. Not for several threads at once."""

    def __init__(
        self, dsn: str, *, patience_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Connect. Unreachable if that fails or takes longer than `patience_s`."""
        self._patience_s = patience_s
        self._clock = clock
        self._connection = pq.PGconn.connect_start(dsn.encode())
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, whatever it is doing."""
        self._connection.finish()

    def query(self, statement: str, *values: Value) -> list[tuple[Value, ...]]:
        """Run one statement; its rows.

        EngineError if PostgreSQL refuses it; UnknownOutcome if no answer comes in time, or the
        connection breaks, and with it the session.
        """
        deadline = self._clock() + self._patience_s
        parameters = [None if value is None else value.encode() for value in values]
        try:
            self._connection.send_query_params(statement.encode(), parameters)
            while self._connection.flush():
                self._wait(deadline, write=True)
            answer = self._answer(deadline)
        except (psycopg.OperationalError, Unreachable) as error:
            raise UnknownOutcome(f"no answer: {str(error).strip()}") from error
        return _rows(answer)

    def _connect(self) -> None:
        connection = self._connection
        deadline = self._clock() + self._patience_s
        awaited = pq.PollingStatus.WRITING  # as PQconnectPoll's documentation says
        while connection.status != pq.ConnStatus.BAD and awaited in {
            pq.PollingStatus.READING,
            pq.PollingStatus.WRITING,
        }:
            self._wait(deadline, write=awaited == pq.PollingStatus.WRITING)
            awaited = pq.PollingStatus(connection.connect_poll())
        if connection.status != pq.ConnStatus.OK:
            raise Unreachable(connection.get_error_message().strip())
        connection.nonblocking = 1

    def _answer(self, deadline: float) -> pq.abc.PGresult | None:
        last = None
        while True:
            while self._connection.is_busy():
                self._wait(deadline, write=False)
                self._connection.consume_input()
            result = self._connection.get_result()
            if result is None:
                return last
            last = result

    def _wait(self, deadline: float, *, write: bool) -> None:
        socket = self._connection.socket
        left_s = deadline - self._clock()
        ready = left_s > 0 and any(
            select.select([] if write else [socket], [socket] if write else [], [], left_s)
        )
        if not ready:
            raise Unreachable(f"nothing for {self._patience_s:g} s")


def _rows(answer: pq.abc.PGresult | None) -> list[tuple[Value, ...]]:
    if answer is None:
        raise UnknownOutcome("the connection broke")
    if answer.status not in _FINE:
        state = answer.error_field(pq.DiagnosticField.SQLSTATE)
        message = answer.get_error_message().strip()
        if state is None:  # libpq's own: the connection is gone
            raise UnknownOutcome(message)
        raise EngineError(message, sqlstate=state.decode())
    return [
        tuple(_text(answer.get_value(row, column)) for column in range(answer.nfields))
        for row in range(answer.ntuples)
    ]


def _text(value: bytes | None) -> Value:
    return None if value is None else bytes(value).decode()
