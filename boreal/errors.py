"""Every error Boreal raises on purpose.

    BorealError
    ├── Refused                  the request was wrong or came too late; nothing was done
    │   ├── StaleEpoch             its epoch is older than the one promised
    │   ├── LineageNotAdopted      the segment was fenced (or was away); send Adopt first
    │   ├── LogGap                 the append starts beyond the SCL
    │   ├── BelowLogStart          that part of the log is not kept here
    │   ├── BeyondLog              that part of the log is not here yet
    │   ├── UnknownVolume          no such volume on this node
    │   ├── VolumeMismatch         the volume exists here with other properties
    │   ├── OversizeRequest        larger than the contract allows
    │   ├── MalformedRequest       not decodable, or out of the contract's range
    │   ├── NoBundle               no bundle at or below the asked LSN
    │   ├── NotWriter              asked of an instance that is not the writer
    │   ├── NotNow                 the moment does not allow it; a later one will
    │   └── BadUsage               a command was given something that can't work; says what would
    ├── Failed                   it was tried and did not happen
    │   ├── CorruptData            a checksum or structure does not hold; never served
    │   │   └── CorruptWal           ... in the log: names the LSN
    │   │       └── RedoFailed         a sound record does not fit the page it names
    │   ├── NotMaterializable      storage cannot prove the page right, so it gives none
    │   ├── IngestStopped          the index met something it must not pass
    │   ├── DiskFull               no room; nothing was acknowledged
    │   ├── QuorumUnavailable      too few nodes answer
    │   ├── Unreachable            the peer could not be reached; the request was not processed
    │   ├── NotIndexedYet          the index did not reach the LSN in time
    │   ├── ProcessFailed          a process we started ended or never became ready
    │   ├── EngineError            PostgreSQL refused a command; `sqlstate` says why
    │   └── Internal               a bug: an invariant does not hold
    └── UnknownOutcome           no answer came: it may or may not have happened

`retryable` says whether the very same request may succeed later. `status` is the gRPC status the
error maps to; boreal/rpc/edge.py is the only place that does the mapping.
"""

from __future__ import annotations

from typing import ClassVar


class BorealError(Exception):
    """Base of all: a message that says what happened and what to do, and facts for programs."""

    retryable: ClassVar[bool] = False
    status: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, **details: int) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    @property
    def code(self) -> str:
        """The name that travels on the wire: the class's own."""
        return type(self).__name__


class Refused(BorealError):
    """Nothing was done."""

    status = "FAILED_PRECONDITION"


class StaleEpoch(Refused):
    """Details: `promised_epoch`."""


class LineageNotAdopted(Refused):
    """Details: `promised_epoch`."""


class LogGap(Refused):
    """Details: `scl`, where the append must start."""

    retryable = True
    status = "OUT_OF_RANGE"


class BelowLogStart(Refused):
    """Details: `start_lsn`."""

    status = "OUT_OF_RANGE"


class BeyondLog(Refused):
    """Details: `scl`."""

    retryable = True
    status = "OUT_OF_RANGE"


class UnknownVolume(Refused):
    """The node has no segment of that volume."""

    status = "NOT_FOUND"


class VolumeMismatch(Refused):
    """A volume of that name exists here with other properties."""

    status = "ALREADY_EXISTS"


class OversizeRequest(Refused):
    """Details: `limit_bytes`."""

    status = "INVALID_ARGUMENT"


class MalformedRequest(Refused):
    """Not decodable, or a field is out of range."""

    status = "INVALID_ARGUMENT"


class NoBundle(Refused):
    """No bundle satisfies the request."""

    status = "NOT_FOUND"


class NotWriter(Refused):
    """Only the writer does this."""


class NotNow(Refused):
    """What goes on at this moment does not allow it."""

    retryable = True


class BadUsage(Refused):
    """The command line, the configuration or the machine does not allow it."""

    status = "INVALID_ARGUMENT"


class Failed(BorealError):
    """It did not happen."""


class CorruptData(Failed):
    """A stored thing is not what was stored."""

    status = "DATA_LOSS"


class CorruptWal(CorruptData):
    """Details: `lsn`."""


class RedoFailed(CorruptWal):
    """Redo met a page it cannot change as the record says. Details: `lsn`."""


class NotMaterializable(Failed):
    """The page's history holds something this node's redo cannot apply."""

    status = "UNIMPLEMENTED"


class IngestStopped(Failed):
    """Details: `lsn`, the record the index would not pass."""

    status = "DATA_LOSS"


class DiskFull(Failed):
    """No room on the node's disk."""

    retryable = True
    status = "RESOURCE_EXHAUSTED"


class QuorumUnavailable(Failed):
    """Details: `answered`, `needed`."""

    retryable = True
    status = "UNAVAILABLE"


class Unreachable(Failed):
    """The peer is down, or the network to it is."""

    retryable = True
    status = "UNAVAILABLE"


class NotIndexedYet(Failed):
    """Details: `indexed_lsn`."""

    retryable = True
    status = "UNAVAILABLE"


class ProcessFailed(Failed):
    """A process Boreal started is gone or not ready."""


class EngineError(Failed):
    """PostgreSQL answered a command with an error."""

    def __init__(self, message: str, *, sqlstate: str = "", **details: int) -> None:
        super().__init__(message, **details)
        self.sqlstate = sqlstate
        """Five characters (PostgreSQL documentation, appendix A); they don't travel over gRPC."""


class Internal(Failed):
    """An invariant does not hold. Please report it."""


class UnknownOutcome(BorealError):
    """No answer came in time, or the connection broke; it may have been carried out."""

    retryable = True
    status = "DEADLINE_EXCEEDED"


def _tree(root: type[BorealError]) -> dict[str, type[BorealError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


BY_CODE: dict[str, type[BorealError]] = _tree(BorealError)
