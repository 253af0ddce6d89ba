"""What an instance lends to its roles, reader and writer."""

from __future__ import annotations

from dataclasses import dataclass

from boreal.types import Lsn
from compute_node.config import ComputeConfig
from compute_node.feed import Feed
from compute_node.fleet import Fleet
from compute_node.lease import Lease
from compute_node.life import Life
from compute_node.log_source import LogSource
from compute_node.page_service import PageService
from compute_node.postgres import Postgres


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """One restored PostgreSQL and what serves it. All of it is the instance's to close."""

    config: ComputeConfig
    life: Life
    fleet: Fleet
    postgres: Postgres
    source: LogSource
    """The volume's log, as far as it is durable ..."""
    feed: Feed
    """... and how it gets into PostgreSQL."""
    pages: PageService
    lease: Lease
    restored_redo: Lsn
    """Where replay began."""
    restored_end: Lsn
    """The end of the bundle it was restored from."""
