"""`python -m storage_node.check DIR`: is everything a stopped node keeps what was stored there?

Of each volume the state file, every page and record of the log (storage_node.check_log), every
content of every bundle, and what the page process keeps (storage_node.check_pages). Nothing is
changed. The directory is held meanwhile, so that the node cannot start under the check.

Exit codes: 0 sound, 1 damaged, 2 not checked.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from boreal.errors import BadUsage, BorealError, CorruptData
from boreal.types import Lsn, format_lsn
from storage_node.bundles import BundleStore, read_manifest
from storage_node.check_log import check_log
from storage_node.check_pages import check_pages
from storage_node.check_report import Damage, Report, Watcher
from storage_node.config import VolumeLayout
from storage_node.segment import read_state

_DAMAGED, _NOT_CHECKED = 1, 2
_MAX_SHOWN = 100


@contextmanager
def stopped(data_dir: Path) -> Iterator[None]:
    """Hold a node's directory; BadUsage if it is none, or its node runs."""
    if not (data_dir / "volumes").is_dir():
        raise BadUsage(f"{data_dir} is not the directory of a storage node: it has no volumes/")
    try:
        # The lock is the log process's own (storage_node.__main__), so it cannot start meanwhile.
        descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadUsage(
            f"{data_dir} has no lock file, so whether its node runs cannot be told. If it does "
            f"not: touch {data_dir / 'lock'}"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadUsage(
                f"the storage node of {data_dir} runs. Stop it first, or compare it while it runs "
                "with `boreal verify`"
            ) from None
        yield
    finally:
        os.close(descriptor)


def check_volume(layout: VolumeLayout, watcher: Watcher) -> Report:
    """Check all that is kept of one volume."""
    report = Report(layout.root.name, watcher)
    try:
        stored = read_state(layout.state)
    except (BorealError, OSError) as error:
        report.damage(
            f"the state file cannot be trusted: {error}",
            "keep this node stopped: what it promised is lost, and it must not vote. Its log and "
            "bundles can still be read by hand; the other five nodes hold the volume",
        )
        return report
    report.count("state files")
    if stored.lineage.last.epoch > stored.promised:
        report.damage(
            f"the lineage ends with epoch {stored.lineage.last.epoch}, "
            f"but only {stored.promised} was promised",
            "keep this node stopped and report it: an invariant does not hold",
        )
    log = check_log(layout.log, stored.kept_from, stored.vdl, stored.lineage, report)
    check_bundles(layout.bundles, log.start, report)
    check_pages(layout, log, report)
    return report


def check_bundles(directory: Path, log_start: Lsn, report: Report) -> None:
    """Check that each bundle has all its contents, as they were, and its log."""
    store = BundleStore(directory)
    seen: set[bytes] = set()
    for path in store.manifest_files():
        try:
            manifest = read_manifest(path)
        except CorruptData as error:
            report.damage(
                error.message,
                f"copy bundles/manifests/{path.name} from the same volume of a stopped peer",
            )
            continue
        report.count("bundles")
        if manifest.redo_lsn < log_start:
            report.damage(
                f"the bundle {path.name} is replayed from {format_lsn(manifest.redo_lsn)}, but the "
                f"log begins at {format_lsn(log_start)}",
                "nothing on this node: a compute node takes that log from its peers, if any has it",
            )
        for file in manifest.files:
            if file.sha256 and file.sha256 not in seen:
                seen.add(file.sha256)
                _check_content(store, file.path, file.sha256, file.size_bytes, report)


def _check_content(
    store: BundleStore, path: str, sha256: bytes, size_bytes: int, report: Report
) -> None:
    try:
        content = store.read(sha256)
    except BorealError as error:
        what = error.message
    else:
        report.count("bundle contents", size_bytes=len(content))
        if len(content) == size_bytes:
            return
        what = f"the content {sha256.hex()} has {len(content)} bytes, not {size_bytes}"
    report.damage(
        f"{what} (it is {path})",
        f"copy bundles/contents/{sha256.hex()} from the same volume of a stopped peer",
    )


# --- the command ---------------------------------------------------------------------------------


class _Screen:
    """Shows progress and damages as they come."""

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self._progress = progress
        self._task = progress.add_task("checking", total=total_bytes)
        self._shown = 0

    def found(self, damage: Damage) -> None:
        """Something is damaged."""
        self._shown += 1
        if self._shown > _MAX_SHOWN:
            return
        console = self._progress.console
        console.print(f"{damage.volume}: {damage.what}", style="red", highlight=False)
        console.print(f"    {damage.remedy}", highlight=False)
        if self._shown == _MAX_SHOWN:
            console.print("... and so on; only counted from here")

    def advanced(self, size_bytes: int) -> None:
        """So much more was read."""
        self._progress.update(self._task, advance=size_bytes)


def check_node(data_dir: Path, console: Console) -> int:
    """Check a stopped node's directory and tell of it; the number of damages."""
    began = time.monotonic()
    with stopped(data_dir), _progress(console) as progress:
        layouts = [VolumeLayout(root=path) for path in sorted((data_dir / "volumes").glob("[!.]*"))]
        screen = _Screen(progress, sum(_stored_bytes(layout.root) for layout in layouts))
        reports = [check_volume(layout, screen) for layout in layouts]
    counts = sum((report.counts for report in reports), Counter[str]())
    damages = sum(len(report.damages) for report in reports)
    seconds = time.monotonic() - began
    checked = ", ".join(f"{number:,} {what}" for what, number in counts.items())
    console.print(f"{data_dir}: {len(reports)} volumes: {checked or 'nothing'}", highlight=False)
    pages = sum(number for what, number in counts.items() if "pages" in what)
    console.print(
        f"{seconds:.1f} seconds, {pages:,} pages, {pages / max(seconds, 0.001):,.0f} pages/s",
        highlight=False,
    )
    style = "bold red" if damages else "bold green"
    console.print(f"{damages} damages", style=style, highlight=False)
    return damages


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _stored_bytes(directory: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in directory.rglob("*") if file.is_file())


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
def main(directory: Path) -> None:
    """Check everything a stopped storage node keeps in DIRECTORY."""
    try:
        damages = check_node(directory, Console(soft_wrap=True))
    except BadUsage as error:
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(error.message, err=True)
        sys.exit(_NOT_CHECKED)
    sys.exit(_DAMAGED if damages else 0)


if __name__ == "__main__":
    main()
