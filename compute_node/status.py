"""What a compute node reports of itself (ComputeStatus of compute.proto)."""

from __future__ import annotations

from collections.abc import Iterable

from boreal.rpc import compute_pb2
from boreal.rpc.edge import volume_ref
from compute_node.config import ComputeConfig
from compute_node.instance import Instance
from compute_node.life import Life
from compute_node.publisher import FollowerStatus
from compute_node.shipper import LinkReport


def status_of(
    config: ComputeConfig, life: Life, instance: Instance | None
) -> compute_pb2.ComputeStatus:
    """The status at this moment."""
    status = compute_pb2.ComputeStatus(
        instance=config.name,
        incarnation=life.identity,
        state=compute_pb2.ComputeState.Value(life.state.name),
        tier=config.tier,
        handover=str(config.handover_socket or ""),
    )
    if instance is None:
        return status
    status.volume.CopyFrom(volume_ref(instance.fleet.volume, instance.fleet.epoch))
    status.vdl = instance.vdl
    status.timeline = instance.timeline
    status.bundle_end_lsn = instance.bundle_end
    status.postgres_pid = instance.postgres.pid
    status.takes_clients = instance.takes_clients
    if instance.writer is not None:
        shipper = instance.writer.shipper
        status.flush_lsn = shipper.end
        status.shipped_bytes = shipper.shipped_bytes
        status.links.extend(_links(shipper.links))
        status.followers.extend(_followers(instance.writer.publisher.followers))
    elif instance.reader is not None:
        status.replay_lsn = instance.reader.replayed
        status.replay_lag_us = instance.reader.lag_us
        status.received_lsn = instance.received
    return status


def _links(links: Iterable[LinkReport]) -> Iterable[compute_pb2.LinkStatus]:
    for link in links:
        yield compute_pb2.LinkStatus(
            node=link.node,
            state=link.state.value,
            scl=link.scl,
            ack_latency_us=link.ack_latency_us,
            ack_p50_us=link.ack_p50_us,
            ack_p99_us=link.ack_p99_us,
        )


def _followers(followers: Iterable[FollowerStatus]) -> Iterable[compute_pb2.FollowerStatus]:
    for follower in followers:
        yield compute_pb2.FollowerStatus(
            instance=follower.instance,
            sent_lsn=follower.sent,
            replay_lsn=follower.replay,
            floor_lsn=follower.floor,
            oldest_xmin=follower.oldest_xmin,
            lag_us=follower.lag_us,
        )


def writing(status: compute_pb2.ComputeStatus) -> bool:
    """Whether an instance with such a status has a log to follow, or will in a moment."""
    return status.state in {compute_pb2.PROMOTING, compute_pb2.WRITER}
