"""The metrics of a storage node's log process. See boreal.metrics.

`volume` is the volume's id: a node holds few, most often one. The page process, which shares next
to nothing with this one, has its own: storage_node.page_metrics.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from prometheus_client import Metric

from boreal.metrics import counters, gauge, gauges, histograms
from storage_node.config import StorageConfig
from storage_node.page_supervisor import PageSupervisor
from storage_node.volumes import Volumes

_VOLUME = ("volume",)


def log_metrics(config: StorageConfig, volumes: Volumes, pages: PageSupervisor) -> Iterator[Metric]:
    """What the log process knows. For its event loop."""
    open_volumes = [((volume,), segment) for volume, segment in volumes if not segment.closed]

    def each(name: str, text: str, values: Iterable[float]) -> Metric:
        labels = (label for label, _ in open_volumes)
        return gauges(name, text, _VOLUME, zip(labels, values, strict=True))

    segments = [segment for _, segment in open_volumes]
    states = [segment.state for segment in segments]
    yield each(
        "boreal_segment_scl_bytes",
        "The log is complete and durable on this node up to this position.",
        (state.scl for state in states),
    )
    yield each(
        "boreal_segment_vdl_bytes",
        "The log is durable on a write quorum up to this position, as this node was told last.",
        (state.vdl for state in states),
    )
    yield each(
        "boreal_segment_behind_bytes",
        "Log that the volume is known to have and this node lacks.",
        (max(0, segment.known_end - segment.state.scl) for segment in segments),
    )
    yield each(
        "boreal_segment_log_start_bytes",
        "The log is kept from this position on.",
        (state.start for state in states),
    )
    yield each(
        "boreal_segment_log_kept_bytes",
        "Log kept, from where it is kept to the SCL.",
        (state.scl - state.start for state in states),
    )
    yield each(
        "boreal_segment_floor_bytes",
        "Nobody asks for a page as of a position below it; 0: not known yet.",
        (segment.shared.floor for segment in segments),
    )
    yield each(
        "boreal_segment_retired_bytes",
        "Below this position no log is needed to make pages; 0: not known yet.",
        (segment.shared.retired for segment in segments),
    )
    yield each(
        "boreal_segment_index_lag_bytes",
        "Log that is on this node and not in its page index.",
        (segment.index_lag_bytes for segment in segments),
    )
    yield each(
        "boreal_segment_promised_epoch",
        "Writers of an older epoch are refused.",
        (state.promised for state in states),
    )
    yield each(
        "boreal_segment_lineage_epoch",
        "The last epoch of the history that this node follows.",
        (state.lineage.last.epoch for state in states),
    )
    yield each(
        "boreal_segment_failed",
        "1 if something is wrong with this copy of the volume; `boreal status` says what.",
        (bool(segment.failure) for segment in segments),
    )
    yield each(
        "boreal_segment_ack_delay_seconds",
        "How long acks are held back at this moment, because the page index lags.",
        (segment.ack_delay_s(config.pressure, 1) for segment in segments),
    )
    yield each(
        "boreal_segment_writer_silence_seconds",
        "Since an append of a writer was taken last.",
        (segment.writer_silent_s for segment in segments),
    )
    yield counters(
        "boreal_segment_appends_total",
        "Appends with log that were taken from a writer.",
        _VOLUME,
        ((label, segment.appends) for label, segment in open_volumes),
    )
    yield counters(
        "boreal_segment_appended_bytes_total",
        "Log that became durable on this node, from a writer or from a peer.",
        _VOLUME,
        ((label, segment.appended_bytes) for label, segment in open_volumes),
    )
    yield counters(
        "boreal_segment_dropped_bytes_total",
        "Log that this node dropped because nobody needs it any more.",
        _VOLUME,
        ((label, segment.dropped_bytes) for label, segment in open_volumes),
    )
    yield histograms(
        "boreal_segment_sync_seconds",
        "What the disk took to make log durable, for each round of appends.",
        _VOLUME,
        ((label, segment.syncs) for label, segment in open_volumes),
    )
    yield gauge(
        "boreal_storage_broken_volumes",
        "Volumes on this node that are refused because their state cannot be trusted.",
        len(volumes.broken),
    )
    yield gauge("boreal_storage_page_process_up", "1 while the page process runs.", pages.running)
    yield counters(
        "boreal_storage_page_process_starts_total",
        "How often the page process was started, the first time included.",
        (),
        [((), pages.starts)],
    )
    room = os.statvfs(config.data_dir)
    yield gauge(
        "boreal_storage_filesystem_free_bytes",
        "Room left where this node keeps everything.",
        room.f_bavail * room.f_frsize,
    )
    yield gauge(
        "boreal_storage_filesystem_size_bytes",
        "Size of the file system where this node keeps everything.",
        room.f_blocks * room.f_frsize,
    )
