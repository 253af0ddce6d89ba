"""Where Boreal's errors and types meet gRPC: the only mapping between the two, in both directions.

Servers are made by `make_server`: a handler raises a BorealError, the caller's stub call raises the
same class again inside `calling(...)`. Nothing outside this module looks at a gRPC status.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc import aio

from boreal import errors
from boreal.errors import BadUsage, BorealError, Internal, UnknownOutcome, Unreachable
from boreal.memory import keep_freed
from boreal.quorum import Lineage
from boreal.rpc import common_pb2
from boreal.rpc.identity import PEER_NAME, Identity
from boreal.types import Epoch, Fork, RelationFork, VolumeId

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""No message of ours comes near it: pages and log travel in chunks of about 1 MiB."""

KEEPALIVE_MS = 10_000
"""A connection with a call under way that was silent for so long is asked for a sign of life. If
none comes for as long again, it is given up."""

_ERROR_KEY = "boreal-error-bin"
_NEVER_CONNECTED = "failed to connect"
"""What gRPC says when there was no connection to send by: it tells it by the words alone."""
_MAX_TEXT = 4000
_MAX_STATUS_TEXT = 200
_HANDSHAKE_S = 5.0
_GOODBYE_S = 1.0
"""Of a lane that is closed in order: a peer that is gone does not answer."""
_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    # A peer that was killed and restarted must be found again within a moment, not in two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # So long an attempt may take: on a busy machine a server needs some time to greet.
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 500),
    # One that comes back may have another address under its name (a container that was on no
    # network for a while). gRPC would ask for it again after half a minute.
    ("grpc.dns_min_time_between_resolutions_ms", 500),
    # A peer behind a broken network hangs up on nobody. The kernel goes on with such a connection
    # for a quarter of an hour, with longer and longer pauses, also once the network is mended.
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
]

_log = structlog.get_logger(__name__)


# --- errors ------------------------------------------------------------------------------------


def error_to_wire(error: BorealError) -> common_pb2.Error:
    """The message form of an error, its text bounded: gRPC bounds metadata, where it travels."""
    message = error.message[:_MAX_TEXT]
    return common_pb2.Error(code=error.code, message=message, details=error.details)


def error_from_wire(wire: common_pb2.Error) -> BorealError:
    """The error a peer sent; Internal if it is of a kind this version does not know."""
    kind = errors.BY_CODE.get(wire.code)
    if kind is None:
        return Internal(f"{wire.code}: {wire.message}")
    return kind(wire.message, **dict(wire.details))


def _from_rpc_error(error: aio.AioRpcError, peer: str, what: str) -> BorealError:
    trailing: Any = error.trailing_metadata() or ()
    wire = dict(trailing).get(_ERROR_KEY)
    if isinstance(wire, bytes):
        return error_from_wire(common_pb2.Error.FromString(wire))
    detail = error.details() or error.code().name
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnknownOutcome(f"{peer} did not answer {what} in time; it may have been done")
    if error.code() is grpc.StatusCode.UNAVAILABLE and _NEVER_CONNECTED in detail:
        return Unreachable(f"{peer} cannot be reached for {what}: {detail}")
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return UnknownOutcome(f"the connection to {peer} broke during {what}: {detail}")
    return Internal(f"{peer} failed in {what}: {error.code().name}: {detail}")


@contextmanager
def calling(peer: str, what: str) -> Iterator[None]:
    """Wrap stub calls: an RPC that fails raises the BorealError it stands for.

    gRPC loses a cancellation that reaches a task while its stream is being set up and fails by
    itself. A caller who cancels waits for the task's end, so it is made good here.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        yield
    except aio.AioRpcError as error:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise _from_rpc_error(error, peer, what) from error


# --- servers and channels ----------------------------------------------------------------------


def expected(error: BaseException) -> BorealError:
    """What a handler's error is to the caller: itself, or Internal and a line in the log."""
    if isinstance(error, BorealError):
        return error
    _log.error("unexpected error in a call's handler", exc_info=error)
    return Internal(f"{type(error).__name__}: {error}")


async def _abort(context: aio.ServicerContext[Any, Any], failure: BaseException) -> None:
    error = expected(failure)
    wire = error_to_wire(error).SerializeToString()
    status = getattr(grpc.StatusCode, error.status)
    await context.abort(
        status, error.message[:_MAX_STATUS_TEXT], trailing_metadata=((_ERROR_KEY, wire),)
    )


if TYPE_CHECKING:
    _Interceptor = aio.ServerInterceptor[Any, Any]
else:
    _Interceptor = aio.ServerInterceptor  # generic in its type stubs only


class _ErrorInterceptor(_Interceptor):
    """Turns a BorealError raised by a handler into the status and metadata it maps to."""

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED by itself
            return None  # type: ignore[return-value]
        # Our services are either unary or streaming in their answer; the request side is untouched.
        if handler.response_streaming:
            inner_stream = handler.unary_stream or handler.stream_stream

            async def streaming(
                request: Any, context: aio.ServicerContext[Any, Any]
            ) -> AsyncIterator[Any]:
                try:
                    async for response in inner_stream(request, context):
                        yield response
                except (aio.AbortError, asyncio.CancelledError, GeneratorExit):
                    raise
                except Exception as error:  # noqa: BLE001 - the edge: everything becomes a status
                    await _abort(context, error)

            wrap: Any = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return wrap(  # type: ignore[no-any-return]
                streaming, handler.request_deserializer, handler.response_serializer
            )
        inner_unary = handler.unary_unary or handler.stream_unary

        async def unary(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            try:
                return await inner_unary(request, context)
            except (aio.AbortError, asyncio.CancelledError):
                raise
            except Exception as error:  # noqa: BLE001 - the edge: everything becomes a status
                await _abort(context, error)

        wrap = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return wrap(  # type: ignore[no-any-return]
            unary, handler.request_deserializer, handler.response_serializer
        )


def make_server() -> aio.Server:
    """A gRPC server with our limits, whose handlers may raise BorealError.

    Every process of ours that moves much data has one: its memory is set up for that here.
    """
    keep_freed()
    return aio.server(interceptors=[_ErrorInterceptor()], options=_OPTIONS)


@dataclass(slots=True)
class _Process:
    """The one thing that all connections of a process share. Set once, before the first."""

    identity: Identity | None = None


_process = _Process()


def use_identity(identity: Identity | None) -> None:
    """Be `identity` in every connection of this process from now on; None: unencrypted."""
    _process.identity = identity


def listen(server: aio.Server, address: str) -> int:
    """Have `server` listen at HOST:PORT; the port. BadUsage if it cannot.

    Whoever has no certificate of this cluster is refused.
    """
    identity = _process.identity
    try:
        if identity is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, identity.server_credentials())
    except RuntimeError as error:
        raise BadUsage(f"cannot listen on {address}: is the port taken?") from error


def open_channel(address: str, identity: Identity | None = None) -> aio.Channel:
    """A channel with our limits. It reconnects by itself; close it when done.

    `identity` is for those who are not the same everywhere; without it, it is the process's.
    """
    identity = identity or _process.identity
    if identity is None:
        return aio.insecure_channel(address, options=_OPTIONS)
    options = [*_OPTIONS, ("grpc.ssl_target_name_override", PEER_NAME)]
    return aio.secure_channel(address, identity.channel_credentials(), options=options)


def lane_server_arguments() -> dict[str, Any]:
    """What to add to the event loop's `create_server` for a framed lane.

    A connection is made, as far as its protocol can tell, once the peer has shown its certificate.
    """
    if _process.identity is None:
        return {}
    return {
        "ssl": _process.identity.server_context(),
        "ssl_handshake_timeout": _HANDSHAKE_S,
        "ssl_shutdown_timeout": _GOODBYE_S,
    }


def lane_client_arguments() -> dict[str, Any]:
    """The same for `create_connection`."""
    if _process.identity is None:
        return {}
    return {
        "ssl": _process.identity.client_context(),
        "server_hostname": PEER_NAME,
        "ssl_handshake_timeout": _HANDSHAKE_S,
        "ssl_shutdown_timeout": _GOODBYE_S,
    }


# --- types -------------------------------------------------------------------------------------


def volume_ref(volume: VolumeId, epoch: int) -> common_pb2.VolumeRef:
    """Name a volume and the epoch the caller acts under."""
    return common_pb2.VolumeRef(volume_id=volume, epoch=epoch)


def lineage_to_wire(lineage: Lineage) -> list[common_pb2.EpochStart]:
    """The repeated field of a lineage."""
    return [common_pb2.EpochStart(epoch=e, start_lsn=s) for e, s in lineage.entries]


def lineage_from_wire(entries: Iterable[common_pb2.EpochStart]) -> Lineage:
    """Read a lineage; MalformedRequest if it is none."""
    try:
        return Lineage.of((entry.epoch, entry.start_lsn) for entry in entries)
    except Internal as error:
        raise errors.MalformedRequest(f"not a lineage: {error.message}") from error


def fork_to_wire(fork: RelationFork) -> common_pb2.RelationFork:
    """The message form of a relation fork."""
    return common_pb2.RelationFork(
        tablespace=fork.tablespace, database=fork.database, relation=fork.relation, fork=fork.fork
    )


def fork_from_wire(wire: common_pb2.RelationFork) -> RelationFork:
    """Read a relation fork; MalformedRequest if there is no such fork."""
    if wire.fork > max(Fork):
        raise errors.MalformedRequest(
            f"fork {wire.fork} does not exist; forks are 0 to {max(Fork)}"
        )
    return RelationFork(wire.tablespace, wire.database, wire.relation, Fork(wire.fork))


def epoch_of(ref: common_pb2.VolumeRef) -> Epoch:
    """The epoch a caller acts under."""
    return Epoch(ref.epoch)
