"""Append, whichever lane it comes by: requests in, responses out, one disk sync for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import structlog

from boreal.errors import BorealError, Internal
from boreal.rpc import storage_pb2
from boreal.rpc.edge import error_to_wire
from storage_node.pressure import Pressure
from storage_node.segment import Segment
from storage_node.volumes import Volumes

_log = structlog.get_logger(__name__)


class Answers(NamedTuple):
    """One response for each request, in order."""

    responses: list[storage_pb2.AppendResponse]
    delay_s: float
    """The writer is to be told after so long (storage_node.pressure)."""


class AppendHandler:
    """Answers appends in order. What it acknowledges is durable."""

    def __init__(
        self, volumes: Volumes, on_advance: Callable[[], None], pressure: Pressure
    ) -> None:
        """`on_advance` is called when there is more to make pages of; it must not wait."""
        self._volumes = volumes
        self._on_advance = on_advance
        self._pressure = pressure

    def handle(self, requests: Iterable[storage_pb2.AppendRequest]) -> Answers:
        """One response for each request. Never raises."""
        taken = [self._stage(request) for request in requests]
        flushed: dict[Segment, storage_pb2.AppendResponse] = {}
        responses = []
        delay_s = 0.0
        for outcome in taken:
            if not isinstance(outcome, Segment):
                responses.append(storage_pb2.AppendResponse(error=error_to_wire(outcome)))
                continue
            response = flushed.get(outcome)
            if response is None:
                before = outcome.state.scl
                response = flushed[outcome] = self._flush(outcome)
                appended = outcome.state.scl - before
                delay_s = max(delay_s, outcome.ack_delay_s(self._pressure, appended))
            responses.append(response)
        if flushed:
            self._on_advance()
        return Answers(responses, delay_s)

    def _stage(self, request: storage_pb2.AppendRequest) -> Segment | BorealError:
        ref, data = request.volume, request.data
        try:
            segment = self._volumes.find(ref.volume_id)
            segment.stage(ref.epoch, request.start_lsn, data, request.vdl)
        except BorealError as error:
            return error
        except OSError as error:
            return _unexpected(error)
        segment.heard_writer(with_data=bool(data), pgmrpl=request.pgmrpl)
        return segment

    def _flush(self, segment: Segment) -> storage_pb2.AppendResponse:
        response = storage_pb2.AppendResponse()
        try:
            response.ack.scl = segment.flush()
        except BorealError as error:
            response.error.CopyFrom(error_to_wire(error))
        except OSError as error:
            response.error.CopyFrom(error_to_wire(_unexpected(error)))
        return response


def _unexpected(error: OSError) -> Internal:
    _log.error("the disk failed an append", exc_info=error)
    return Internal(f"the disk failed: {error}")
