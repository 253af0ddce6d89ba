"""The offline check of what a page process keeps: imported pages, index layers, stored versions."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from pathlib import Path

from boreal.errors import BorealError, CorruptData
from boreal.types import PAGE_BYTES, BlockNumber, Lsn, PageKey, format_lsn
from storage_node.check_log import CheckedLog
from storage_node.check_report import Report
from storage_node.config import VolumeLayout
from storage_node.entries import PAGE_KEY_BYTES, page_of_key, start_of
from storage_node.index import StoredIndex, stored_index
from storage_node.layer_file import SealedLayer, layer_path
from storage_node.page_store import PageStore

_PROGRESS_PAGES = 1024
_FROM_PEER = (
    "replace {} by that of the same volume of a stopped peer: what a volume began with is the same "
    "on every node"
)
_START = "start the node: it makes this layer again from its log"
_SERVED_BY_PEERS = (
    "nothing on this node: it refuses the page and its peers serve it, until the page's next base "
    "or version. Find out what the disk did"
)
_REBUILD = "keep this node stopped: its copy of the volume has to be rebuilt from a peer"


def check_pages(layout: VolumeLayout, log: CheckedLog, report: Report) -> None:
    """Check all that is kept below pages/ against its checksums, and what of it names the log.

    Every entry of every layer must point at the beginning of a record. That the record touches the
    page is not looked at: `boreal verify` compares the pages themselves.
    """
    if not layout.pages.exists():
        return  # no import has come here yet
    remedy = _FROM_PEER.format("pages/imports and pages/imports.seal")
    try:
        store = PageStore(layout.pages)
    except BorealError as error:
        report.damage(error.message, remedy)
        return
    try:
        if store.imported is not None:
            _check_imports(store, remedy, report)
            _check_index(layout.pages / "index", store.imported.lsn, log, report)
    finally:
        store.close()


def _check_imports(store: PageStore, remedy: str, report: Report) -> None:
    for fork, blocks in store.imported.forks if store.imported else ():
        read = 0
        for block in range(blocks):
            try:
                store.page(PageKey(fork, BlockNumber(block)))
                read += 1
            except BorealError as error:
                report.damage(error.message, remedy)
        report.count("imported pages", read, size_bytes=read * PAGE_BYTES)


# --- the index -----------------------------------------------------------------------------------


def _check_index(path: Path, imported: Lsn, log: CheckedLog, report: Report) -> None:
    if not path.exists() and log.start <= imported:
        return  # it is made from the log at the next start
    try:
        with stored_index(path) as index:
            _check_layers(path, index, log, report)
            _check_versions(index, log, report)
    except CorruptData as error:
        again = "remove pages/index and start the node: it is made again from the log"
        report.damage(error.message, again if log.start <= imported else _REBUILD)


def _check_layers(path: Path, index: StoredIndex, log: CheckedLog, report: Report) -> None:
    """Each layer is whole, they follow each other, and each entry names a record of the log."""
    reaches = index.layers[0][0] if index.layers else index.sealed_to
    if reaches < log.start:
        report.damage(
            f"the page index needs the log from {format_lsn(reaches)}, "
            f"which begins at {format_lsn(log.start)}",
            _REBUILD,
        )
    for begin, end in index.layers:
        if begin != reaches:
            report.damage(
                f"the layers of the page index leave out {format_lsn(reaches)} to "
                f"{format_lsn(begin)}",
                _REBUILD,
            )
        reaches = end
        try:
            layer = SealedLayer(layer_path(path, begin, end))
        except (CorruptData, FileNotFoundError) as error:
            report.damage(f"a layer of the page index: {error}", _START)
            continue
        try:
            _check_entries(layer, log, report)
        finally:
            layer.close()
    if reaches != index.sealed_to or index.sealed_to > log.end:
        report.damage(
            f"the page index says that it reaches to {format_lsn(index.sealed_to)}; its layers end "
            f"at {format_lsn(reaches)}, the log at {format_lsn(log.end)}",
            _REBUILD,
        )


def _check_entries(layer: SealedLayer, log: CheckedLog, report: Report) -> None:
    pages = entries = astray = 0
    for page in layer.all():
        pages += 1
        entries += len(page.entries)
        for entry in page.entries:
            start = start_of(entry)
            inside = layer.begin <= start < layer.end
            astray += not inside or (log.whole and not _contains(log.records, start))
    report.count("index pages", pages, size_bytes=layer.path.stat().st_size)
    report.count("index entries", entries)
    if astray:
        report.damage(f"{astray} of {entries} entries in {layer.path} name no record", _START)


def _contains(ascending: array[int], number: int) -> bool:
    at = bisect_left(ascending, number)
    return at < len(ascending) and ascending[at] == number


def _check_versions(index: StoredIndex, log: CheckedLog, report: Report) -> None:
    """Each version is what was stored, and none is ahead of the log."""
    pages = size_bytes = 0
    for version in index.versions():
        pages += 1
        size_bytes += len(version.stored)
        if not version.sound or version.lsn > log.end:
            what = "is ahead of the log" if version.sound else "does not match its checksum"
            page = page_of_key(version.key[:PAGE_KEY_BYTES])
            report.damage(
                f"the stored version of {page} at {format_lsn(version.lsn)} {what}",
                _SERVED_BY_PEERS,
            )
        if pages % _PROGRESS_PAGES == 0:
            report.count("versions (pages)", _PROGRESS_PAGES, size_bytes=size_bytes)
            size_bytes = 0
    report.count("versions (pages)", pages % _PROGRESS_PAGES, size_bytes=size_bytes)
