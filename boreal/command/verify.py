"""`boreal verify`: does storage hold the pages that PostgreSQL holds, on every node?"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from boreal.cluster import ClusterConfig
from boreal.command.remote import connect
from boreal.command.roster import storage_names
from boreal.errors import Internal
from boreal.rpc import compute_pb2
from boreal.types import Fork, format_lsn


async def verify(config: ClusterConfig, nodes: Sequence[str], console: Console) -> int:
    """Run it, show it, and return the number of differences."""
    began = time.monotonic()
    summary: compute_pb2.VerifySummary | None = None
    async with connect(config) as remote:
        writer = await remote.writer()
        with _progress(console) as progress:
            task = progress.add_task("pages", total=None)
            async for event in remote.verify(writer, nodes):
                match event.WhichOneof("event"):
                    case "progress":
                        done, total = event.progress.pages_done, event.progress.pages_total
                        progress.update(task, completed=done, total=total)
                    case "difference":
                        progress.console.print(_difference(event.difference), style="red")
                    case "summary":
                        summary = event.summary
    if summary is None:
        raise Internal("the writer ended the comparison without a result")
    console.print(_totals(summary, time.monotonic() - began))
    return summary.differences


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _difference(page: compute_pb2.PageDifference) -> str:
    if not page.relation:
        return f"{page.node}: {page.reason}"
    fork = Fork(page.fork.fork).name.lower()
    name = f"{page.database}.{page.relation}" if page.database else f"(orphan) {page.relation}"
    return f"{page.node}: {name} {fork} fork, block {page.block} differs: {page.reason}"


def _totals(summary: compute_pb2.VerifySummary, seconds: float) -> Table:
    rate = summary.pages / max(seconds, 0.001)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{summary.databases}", "databases")
    table.add_row(f"{summary.relations}", "relations")
    table.add_row(
        f"{summary.orphans}",
        f"forks that no catalog names, {summary.orphan_pages} pages: compared between nodes only",
    )
    table.add_row(f"{summary.pages}", f"pages compared as of {format_lsn(summary.lsn)}")
    table.add_row(f"{len(summary.nodes)}", f"storage nodes: {', '.join(summary.nodes)}")
    table.add_row(f"{seconds:.1f}", f"seconds: {rate:,.0f} pages/s on each node")
    style = "bold red" if summary.differences else "bold green"
    table.add_row(f"{summary.differences}", "pages differ", style=style)
    return table


def verify_offline(data_dir: Path, place: str) -> int:
    """Check the directory of a stopped storage node, named or by its path; the exit code."""
    directory = data_dir / place if place in storage_names() else Path(place)
    # A process of its own: what a storage node's files look like is that service's knowledge.
    checking = (sys.executable, "-P", "-m", "storage_node.check", str(directory))
    return subprocess.run(checking, check=False).returncode
