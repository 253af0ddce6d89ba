"""The metrics of a storage node's page process. See boreal.metrics."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from stat import S_ISREG

from prometheus_client import Metric

from boreal.metrics import counters, gauges, histograms
from storage_node.config import StorageConfig
from storage_node.layer_file import SUFFIX
from storage_node.page_volume import IndexGauges, PageVolume

_VOLUME = ("volume",)
_BLOCK_BYTES = 512
"""What st_blocks counts in, whatever the file system (stat(2))."""


def page_metrics(volumes: Iterable[PageVolume]) -> Iterator[Metric]:
    """What the page process knows. For its event loop."""
    known = [(each, gauges_now) for each in volumes if (gauges_now := each.gauges) is not None]
    yield from _index_metrics(known)
    made = [((each.volume,), each.reads) for each, _ in known if each.reads is not None]
    yield counters(
        "boreal_pages_stored_reads_total",
        "Pages asked for that took no more than reading their stored version.",
        _VOLUME,
        ((label, reads.stored) for label, reads in made),
    )
    yield histograms(
        "boreal_pages_redo_seconds",
        "What it took to make a page that was asked for and had no stored version of that moment.",
        _VOLUME,
        ((label, reads.redone) for label, reads in made),
    )
    yield histograms(
        "boreal_pages_chain_records",
        "Records that were applied to make such a page; 0: it was as the volume began with it.",
        _VOLUME,
        ((label, reads.chains) for label, reads in made),
    )
    yield counters(
        "boreal_pages_cache_hits_total",
        "Times a page in memory spared some of the way from the stored version.",
        _VOLUME,
        ((label, reads.cached) for label, reads in made),
    )
    yield histograms(
        "boreal_pages_index_wait_seconds",
        "How long page reads waited for the index to get to their position.",
        _VOLUME,
        (((each.volume,), each.waits) for each, _ in known),
    )


def _index_metrics(known: list[tuple[PageVolume, IndexGauges]]) -> Iterator[Metric]:
    def each(name: str, text: str, values: Iterable[float]) -> Metric:
        labels = ((volume.volume,) for volume, _ in known)
        return gauges(name, text, _VOLUME, zip(labels, values, strict=True))

    indexes = [index for _, index in known]
    yield each(
        "boreal_pages_indexed_bytes",
        "The log is in the page index up to this position.",
        (index.indexed for index in indexes),
    )
    yield each(
        "boreal_pages_index_lag_bytes",
        "Durable log that is not in the page index.",
        (index.lag_bytes for index in indexes),
    )
    yield each(
        "boreal_pages_lowest_bytes",
        "Pages can be had as of this position in the log, and later ones.",
        (index.lowest for index in indexes),
    )
    yield each(
        "boreal_pages_retired_bytes",
        "Below this position no log is needed to make pages.",
        (index.retired for index in indexes),
    )
    yield each(
        "boreal_pages_layers",
        "Sealed layers of the page index.",
        (index.layers for index in indexes),
    )
    yield each(
        "boreal_pages_unsettled_layers",
        "Layers with pages that are to be stored once the log is quiet.",
        (index.unsettled for index in indexes),
    )
    yield each(
        "boreal_pages_versions",
        "Stored versions of pages, besides those the volume began with.",
        (index.versions for index in indexes),
    )
    yield each(
        "boreal_pages_longest_chain_records",
        "The most records that lately lay between a page and its stored version.",
        (index.longest_chain for index in indexes),
    )
    yield each(
        "boreal_pages_refused",
        "Pages given up when log was retired, since the process began.",
        (index.refused_pages for index in indexes),
    )
    yield each(
        "boreal_pages_retirement_held",
        "1 if old log cannot be retired though it is time; `boreal status` or the log says why.",
        (bool(index.held) for index in indexes),
    )
    yield each(
        "boreal_pages_failed",
        "1 if the page index does not go on.",
        (bool(volume.failure) for volume, _ in known),
    )


def disk_metrics(config: StorageConfig) -> Iterator[Metric]:
    """What the node's volumes take on disk. Looks at every file: not for an event loop."""
    rows = []
    for root in sorted(config.volumes_dir.glob("[!.]*")):
        taken = {"log": 0, "bundles": 0, "layers": 0, "pages": 0}
        for path, size_bytes in _files(root):
            kind = path.relative_to(root).parts[0]
            if path.suffix == SUFFIX:
                kind = "layers"
            if kind in taken:
                taken[kind] += size_bytes
        rows += [((root.name, kind), size_bytes) for kind, size_bytes in taken.items()]
    yield gauges(
        "boreal_storage_disk_bytes",
        "What a volume takes on this node's disk: its log, bundles, the page index's layers, and "
        "stored pages.",
        ("volume", "kind"),
        rows,
    )


def _files(root: Path) -> Iterator[tuple[Path, int]]:
    """Every file below `root` and the bytes it takes; files may go meanwhile."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue
            if S_ISREG(found.st_mode):
                yield path, found.st_blocks * _BLOCK_BYTES
