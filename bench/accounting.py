"""CPU time by kind of process, over process trees whose members come and go.

A living process shows its own time; when it ends and is waited for, that time moves into its
parent's children time (proc(5): cutime, cstime). So two snapshots of a tree tell all the time spent
between them, also that of processes which began *and* ended in between: client backends, above all.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import psutil


class Kind(StrEnum):
    """What a process does, in the words of the report."""

    BACKENDS = "backends"
    WALSENDER = "walsender"
    POSTGRES = "postgres other"  # postmaster, WAL writer, checkpointer, ...
    AGENT = "agent"
    STORAGE_LOG = "storage log"
    STORAGE_PAGES = "storage pages"
    CONTROL = "control plane"
    ENDPOINTS = "endpoints"
    RECEIVE = "standby receive"
    REPLAY = "standby replay"
    STANDBY = "standby other"


_REAPED_AS = {Kind.POSTGRES: Kind.BACKENDS, Kind.AGENT: Kind.POSTGRES}
"""What the ended children of a process were. A postmaster's are nearly all client backends; the few
autovacuum workers among them count as such."""

_TITLE = re.compile(r"postgres: (?:\S+: )?(?P<role>.+)")
"""A PostgreSQL process's title: `postgres: [cluster_name: ]role ...` (ps_status.c)."""
_HELPERS = ("checkpointer", "background writer", "walwriter", "autovacuum", "logical replication",
            "archiver", "logger")  # fmt: skip


def writer_kind(title: str) -> Kind:
    """The kind of a PostgreSQL process of a primary, by its title."""
    match = _TITLE.match(title)
    if match is None or match["role"].startswith(_HELPERS):
        return Kind.POSTGRES
    return Kind.WALSENDER if match["role"].startswith("walsender") else Kind.BACKENDS


def standby_kind(title: str) -> Kind:
    """The kind of a PostgreSQL process of a standby, by its title."""
    match = _TITLE.match(title)
    role = match["role"] if match else ""
    if role.startswith("walreceiver"):
        return Kind.RECEIVE
    return Kind.REPLAY if role.startswith("startup") else Kind.STANDBY


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A process, its descendants, and how to tell their kinds."""

    root_pid: int
    root_kind: Kind
    child_kind: Callable[[str], Kind]
    """The kind of a descendant, from its title."""


class ProcessId(NamedTuple):
    """A process for ever: pids are used again, pids with a start time are not."""

    pid: int
    started: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One line of the process table."""

    id: ProcessId
    parent_pid: int
    title: str
    own_s: float
    reaped_s: float
    """Time of its ended descendants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """A process's time, and where it is to be booked."""

    kind: Kind
    reaped_kind: Kind
    ended_kind: Kind | None
    """Where its parent will show its time once it has ended; None for the root of a tree."""
    own_s: float
    reaped_s: float


Usages = Mapping[ProcessId, Usage]


def attribute(processes: Iterable[Process], trees: Iterable[Tree]) -> dict[ProcessId, Usage]:
    """Find the members of the trees in the process table."""
    table = {process.id.pid: process for process in processes}
    children: dict[int, list[Process]] = defaultdict(list)
    for process in table.values():
        children[process.parent_pid].append(process)
    usages: dict[ProcessId, Usage] = {}

    def book(process: Process, kind: Kind, ended_kind: Kind | None, tree: Tree) -> None:
        reaped_kind = _REAPED_AS.get(kind, kind)
        usages[process.id] = Usage(
            kind=kind,
            reaped_kind=reaped_kind,
            ended_kind=ended_kind,
            own_s=process.own_s,
            reaped_s=process.reaped_s,
        )
        for child in children[process.id.pid]:
            book(child, tree.child_kind(child.title), reaped_kind, tree)

    for tree in trees:
        if tree.root_pid in table:
            book(table[tree.root_pid], tree.root_kind, None, tree)
    return usages


def spent(before: Usages, after: Usages) -> dict[Kind, float]:
    """CPU seconds by kind between two snapshots of the same trees."""
    seconds: dict[Kind, float] = defaultdict(float)
    for process, usage in after.items():
        earlier = before.get(process)
        seconds[usage.kind] += usage.own_s - (earlier.own_s if earlier else 0)
        seconds[usage.reaped_kind] += usage.reaped_s - (earlier.reaped_s if earlier else 0)
    for process, usage in before.items():
        if process not in after and usage.ended_kind is not None:
            # Its whole life has come up in its parent's children time; this part was before.
            seconds[usage.ended_kind] -= usage.own_s + usage.reaped_s
    return {kind: seconds[kind] for kind in Kind if kind in seconds}


def process_table() -> list[Process]:
    """Every process of the machine, now."""
    table = []
    wanted = ["pid", "ppid", "create_time", "cmdline", "cpu_times"]
    for process in psutil.process_iter(wanted):
        info = process.info
        times = info["cpu_times"]
        if times is None:  # ended while being looked at
            continue
        table.append(
            Process(
                id=ProcessId(info["pid"], info["create_time"]),
                parent_pid=info["ppid"],
                title=" ".join(info["cmdline"] or ()),
                own_s=times.user + times.system,
                reaped_s=times.children_user + times.children_system,
            )
        )
    return table


def machine_busy_s() -> float:
    """CPU seconds this machine has been busy since it started, stolen time included."""
    times = psutil.cpu_times()
    busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    return float(busy)


def cores() -> int:
    """How many CPU seconds this machine has in a second."""
    return psutil.cpu_count() or 1
