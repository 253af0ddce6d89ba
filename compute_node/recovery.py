"""Taking a volume over: the I/O around boreal.quorum.recovery (design section 3, steps 1 to 4)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import structlog

from boreal.errors import (
    BorealError,
    CorruptData,
    CorruptWal,
    QuorumUnavailable,
    UnknownOutcome,
    Unreachable,
)
from boreal.quorum import SIX_WAY, RecoveryPlan, SegmentState, choose_source, plan_recovery
from boreal.quorum.lease import former_holds_until
from boreal.types import PAGE_BYTES, Epoch, Lsn, NodeName, format_lsn
from boreal.wal import last_record_end
from compute_node.fleet import MAX_READ_LOG_BYTES, Fleet
from compute_node.storage_client import SegmentPosition

_log = structlog.get_logger(__name__)

_RETRY_S = 0.2
_POLL_S = 0.05
_FIRST_TAIL_BYTES = 64 * 1024


async def recover(
    fleet: Fleet,
    epoch: Epoch,
    *,
    on_fenced: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> RecoveryPlan:
    """Make `epoch` the volume's writer epoch; return the log it begins with, durable on a quorum.

    `on_fenced` is told, once a write quorum refuses the former writer, until when on `clock` that
    one may still hold its lease.

    Waits as long as it takes for a write quorum of nodes. Raises StaleEpoch if a newer epoch took
    the volume meanwhile.

    The plan is made once and then only carried out: a second plan under the same epoch might cut
    elsewhere, and two histories would share one epoch. Whoever gives up in between needs a new one.
    """
    answers = await _fence(fleet, epoch)
    if on_fenced is not None:
        silent_s = [answer.writer_silent_s for answer in answers.values()]
        on_fenced(former_holds_until(clock(), silent_s))
    plan = await _plan(fleet, epoch, _states(answers))
    _log.info("recovery planned", epoch=epoch, end=format_lsn(plan.end), source=plan.source)
    await _carry_out(fleet, plan)
    return plan


async def _plan(fleet: Fleet, epoch: Epoch, answers: dict[NodeName, SegmentState]) -> RecoveryPlan:
    while True:
        try:
            source = choose_source(SIX_WAY, epoch, answers)
            end = await find_log_end(fleet, source, answers[source])
            return plan_recovery(SIX_WAY, epoch, answers, end)
        except (CorruptData, Unreachable, UnknownOutcome) as error:
            # The rest decide, as if it had not answered: if they are still a write quorum, one of
            # them holds all that was ever acknowledged.
            _log.warning("this node's log cannot be taken over", node=source, reason=error.message)
            del answers[source]
        except QuorumUnavailable as error:
            _log.warning("waiting for storage nodes", reason=error.message)
            await asyncio.sleep(_RETRY_S)
            answers = _states(await _fence(fleet, epoch))


async def _fence(fleet: Fleet, epoch: Epoch) -> dict[NodeName, SegmentPosition]:
    while True:
        try:
            return await fleet.fence(epoch)
        except QuorumUnavailable as error:
            _log.warning("waiting for storage nodes to fence", reason=error.message)
            await asyncio.sleep(_RETRY_S)


async def find_log_end(fleet: Fleet, source: NodeName, state: SegmentState) -> Lsn:
    """T: the end of the last complete record in `source`'s log.

    Looks at the log's tail, further back each time until a complete record is found: one record may
    be longer than any first guess.
    """
    tail = _FIRST_TAIL_BYTES
    while True:
        start = Lsn(max(state.start, state.scl - tail) // PAGE_BYTES * PAGE_BYTES)
        end = last_record_end(await _read(fleet, source, start, state.scl), start)
        if end is not None:
            return end
        if start == state.start:
            raise CorruptWal(
                f"{source} holds no complete WAL record from {format_lsn(start)} on", lsn=start
            )
        tail *= 4


async def _read(fleet: Fleet, source: NodeName, start: Lsn, end: Lsn) -> bytes:
    pieces = range(start, end, MAX_READ_LOG_BYTES)
    return b"".join(
        [
            await fleet.read_log(Lsn(at), Lsn(min(at + MAX_READ_LOG_BYTES, end)), node=source)
            for at in pieces
        ]
    )


async def _carry_out(fleet: Fleet, plan: RecoveryPlan) -> None:
    """Adopt everywhere; wait until a write quorum holds the log up to its end.

    Nodes that are behind fill up from their peers by themselves once they adopted.
    """
    while True:
        try:
            states = _states(await fleet.adopt(plan.lineage))
        except QuorumUnavailable as error:
            _log.warning("waiting for storage nodes to adopt", reason=error.message)
            await asyncio.sleep(_RETRY_S)
            continue
        if plan.carried_out(SIX_WAY, states):
            return
        for _ in range(int(1 / _POLL_S)):
            await asyncio.sleep(_POLL_S)
            try:
                if plan.carried_out(SIX_WAY, _states(await fleet.positions())):
                    return
            except BorealError as error:
                _log.info("positions not to be had", reason=error.message)


def _states(positions: Mapping[NodeName, SegmentPosition]) -> dict[NodeName, SegmentState]:
    return {name: position.state for name, position in positions.items()}
