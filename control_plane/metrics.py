"""The control plane's metrics: the cluster as its members report it. See boreal.metrics.

`node` is a storage node's name, `name` an instance's. (`instance` is Prometheus' own label: whose
scrape it was.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import Metric

from boreal.histogram import Durations
from boreal.metrics import counters, gauge, gauges, histogram
from boreal.rpc import compute_pb2, control_pb2
from control_plane.events import EventKind
from control_plane.launcher import Launcher
from control_plane.state import ControlState

_ROLES = {
    "writer": {compute_pb2.WRITER, compute_pb2.YIELDING},
    "reader": {compute_pb2.READER},
    "promoting": {compute_pb2.PROMOTING},
}


class ClusterMetrics:
    """Collects what the control plane knows; keeps count of what happened.

    Events are counted as the store has them: a control plane that was started again goes on where
    the former one ended, as long as the store still has all of them (control_plane.events).
    """

    def __init__(
        self,
        status: Callable[[], control_pb2.ClusterStatus],
        state: ControlState,
        launcher: Launcher | None,
    ) -> None:
        self._status = status
        self._state = state
        self._launcher = launcher
        self._last_event = 0
        self._events: Counter[EventKind] = Counter()
        self._failovers = Durations(first=14, last=26)

    def collect(self) -> Iterator[Metric]:
        """All of it. For the event loop."""
        status = self._status()
        yield gauge(
            "boreal_cluster_volume_ready", "1 once the volume was made.", status.volume_ready
        )
        yield gauge(
            "boreal_cluster_epoch",
            "The epoch of the last writer that was appointed.",
            status.volume.epoch,
        )
        yield from _storage(status)
        yield from _instances(status)
        yield from self._history()

    def _history(self) -> Iterator[Metric]:
        for event in self._state.events_after(self._last_event):
            self._last_event = event.id
            self._events[event.kind] += 1
            if event.kind is EventKind.FAILOVER_COMPLETED:
                self._failovers.observe(event.took_ms / 1000)
        yield counters(
            "boreal_events_total",
            "What happened, as `boreal events` tells it.",
            ("kind",),
            (((kind.value.replace(" ", "_"),), self._events[kind]) for kind in EventKind),
        )
        yield histogram(
            "boreal_failover_seconds",
            "How long failovers took, planned ones too, until the new writer served.",
            self._failovers,
        )
        if self._launcher is not None:
            yield counters(
                "boreal_launcher_starts_total",
                "How often the control plane started a process again that had died.",
                ("process",),
                (((name,), count) for name, count in sorted(self._launcher.starts.items())),
            )


def _storage(status: control_pb2.ClusterStatus) -> Iterator[Metric]:
    labels = ("node", "zone")
    nodes = [((each.node.name, each.node.zone), each) for each in status.storage]
    yield gauges(
        "boreal_cluster_storage_alive",
        "1 if the storage node reports.",
        labels,
        ((label, node.alive) for label, node in nodes),
    )
    yield gauges(
        "boreal_cluster_storage_silence_seconds",
        "Since the storage node reported last.",
        labels,
        ((label, node.silent_ms / 1000) for label, node in nodes),
    )
    segments = [
        (label, segment)
        for label, node in nodes
        for segment in node.segments
        if segment.volume_id == status.volume.volume_id
    ]
    told = (each.status.vdl for each in status.instances)
    vdl = max([0, *told, *(segment.vdl for _, segment in segments)])
    yield gauge(
        "boreal_cluster_vdl_bytes",
        "The log is durable on a write quorum up to this position, by what was reported.",
        vdl,
    )
    yield gauges(
        "boreal_cluster_segment_lag_bytes",
        "Durable log that the storage node lacks.",
        labels,
        ((label, max(0, vdl - segment.scl)) for label, segment in segments),
    )
    yield gauges(
        "boreal_cluster_segment_index_lag_bytes",
        "Log on the storage node that is not in its page index.",
        labels,
        ((label, max(0, segment.scl - segment.indexed_lsn)) for label, segment in segments),
    )
    yield gauges(
        "boreal_cluster_segment_log_kept_bytes",
        "Log that the storage node keeps.",
        labels,
        ((label, max(0, segment.scl - segment.start_lsn)) for label, segment in segments),
    )
    yield gauges(
        "boreal_cluster_segment_failed",
        "1 if something is wrong with the node's copy of the volume; `boreal status` says what.",
        labels,
        ((label, bool(segment.failure)) for label, segment in segments),
    )


def _instances(status: control_pb2.ClusterStatus) -> Iterator[Metric]:
    instances = [((each.status.instance,), each) for each in status.instances]
    yield gauges(
        "boreal_cluster_instance_alive",
        "1 if the instance reports.",
        ("name",),
        ((label, each.alive) for label, each in instances),
    )
    yield gauges(
        "boreal_cluster_instance_takes_clients",
        "1 if the instance reports, and that clients may connect to it.",
        ("name",),
        ((label, each.alive and each.status.takes_clients) for label, each in instances),
    )
    yield gauges(
        "boreal_cluster_instance_role",
        "1 for the role of an instance that reports.",
        ("name", "role"),
        (
            ((each.status.instance, role), each.alive and each.status.state in states)
            for _, each in instances
            for role, states in _ROLES.items()
        ),
    )
    serving = (
        each.alive and each.status.state == compute_pb2.WRITER and each.status.takes_clients
        for _, each in instances
        if each.status.instance == status.writer
    )
    yield gauge(
        "boreal_cluster_writer_serves",
        "1 if the last writer that was appointed reports, and serves clients.",
        any(serving),
    )
