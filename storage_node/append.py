"""Append, whichever lane it comes by: requests in, responses out, one disk sync for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import structlog

from boreal.errors import BorealError, Internal
from boreal.rpc import storage_pb2
from boreal.rpc.edge import error_to_wire
from boreal.types import Lsn
from storage_node.segment import Segment
from storage_node.volumes import Volumes

_log = structlog.get_logger(__name__)


class AppendHandler:
    """Answers appends in order. What it acknowledges is durable."""

    def __init__(self, volumes: Volumes, on_advance: Callable[[], None]) -> None:
        """`on_advance` is called when there is more to make pages of; it must not wait."""
        self._volumes = volumes
        self._on_advance = on_advance

    def handle(
        self, requests: Iterable[storage_pb2.AppendRequest]
    ) -> list[storage_pb2.AppendResponse]:
        """One response for each request. Never raises."""
        taken = [self._stage(request) for request in requests]
        flushed: dict[int, Lsn | BorealError] = {}
        responses = []
        for outcome in taken:
            result: Lsn | BorealError
            if isinstance(outcome, Segment):
                key = id(outcome)
                if key not in flushed:
                    flushed[key] = self._flush(outcome)
                result = flushed[key]
            else:
                result = outcome
            responses.append(_response(result))
        if any(isinstance(outcome, Segment) and outcome.facts.materialize for outcome in taken):
            self._on_advance()
        return responses

    def _stage(self, request: storage_pb2.AppendRequest) -> Segment | BorealError:
        ref = request.volume
        try:
            segment = self._volumes.find(ref.volume_id)
            segment.stage(ref.epoch, request.start_lsn, request.data, request.vdl)
        except BorealError as error:
            return error
        except OSError as error:
            return _unexpected(error)
        segment.heard_writer(with_data=bool(request.data), pgmrpl=request.pgmrpl)
        return segment

    def _flush(self, segment: Segment) -> Lsn | BorealError:
        try:
            return segment.flush()
        except BorealError as error:
            return error
        except OSError as error:
            return _unexpected(error)


def _unexpected(error: OSError) -> Internal:
    _log.error("the disk failed an append", exc_info=error)
    return Internal(f"the disk failed: {error}")


def _response(result: Lsn | BorealError) -> storage_pb2.AppendResponse:
    if isinstance(result, BorealError):
        return storage_pb2.AppendResponse(error=error_to_wire(result))
    return storage_pb2.AppendResponse(ack=storage_pb2.AppendAck(scl=result))
