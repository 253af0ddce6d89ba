"""A compute node's metrics: of the agent, its role, and its PostgreSQL. See boreal.metrics.

Counters of a role begin anew with each life, as they would with a new process; what only a writer
has is there on the writer alone. `node` is a storage node's name, `reader` an instance's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client import Metric

from boreal.metrics import counter, counters, gauge, gauges, histogram, histograms
from boreal.types import NodeName
from compute_node.agent import Agent
from compute_node.config import ComputeConfig
from compute_node.instance import Instance
from compute_node.life import LifeState
from compute_node.page_service import PageService
from compute_node.read_path import ReadPath
from compute_node.reader import Reader
from compute_node.shipper import LinkState
from compute_node.statistics import EngineStatistics
from compute_node.writer import Writer

_BLOCK_BYTES = 512
"""What st_blocks counts in, whatever the file system (stat(2))."""


def agent_metrics(config: ComputeConfig, agent: Agent) -> Iterator[Metric]:
    """What the agent knows. For its event loop."""
    state, instance = agent.state, agent.instance
    yield gauges(
        "boreal_instance_state",
        "1 for the state the instance is in.",
        ("state",),
        (((each.value,), each is state) for each in LifeState),
    )
    yield counter(
        "boreal_instance_lives_total",
        "How often this instance began to serve from storage, the first time included.",
        agent.lives,
    )
    yield gauge(
        "boreal_instance_tier",
        "Failover priority: of the readers that can, the one with the lowest takes over.",
        config.tier,
    )
    yield gauge(
        "boreal_instance_control_silence_seconds",
        "Since the control plane answered a heartbeat last.",
        time.monotonic() - agent.told_at,
    )
    if instance is not None:
        yield from _instance_metrics(config, instance)


def local_metrics(config: ComputeConfig) -> Iterator[Metric]:
    """What PGDATA takes. Looks at every file: not for an event loop."""
    try:
        folders = [config.pgdata / "global", *(config.pgdata / "base").iterdir()]
        blocks = sum(map(_blocks_in, folders))
    except OSError:  # it is being made anew
        return
    yield gauge(
        "boreal_cache_local_bytes",
        "Pages in local files: storage is not asked for them.",
        blocks * _BLOCK_BYTES,
    )


def _blocks_in(folder: Path) -> int:
    """What its files take, in stat(2)'s blocks.

    Cheaper than to look which are a relation's, which nearly all are: there are a thousand, and
    what the scrape's thread does delays commits.
    """
    blocks = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                blocks += entry.stat(follow_symlinks=False).st_blocks
    return blocks


def _instance_metrics(config: ComputeConfig, instance: Instance) -> Iterator[Metric]:
    yield gauge(
        "boreal_instance_epoch",
        "The epoch under which this instance asks storage.",
        instance.fleet.epoch,
    )
    yield gauge(
        "boreal_instance_takes_clients", "1 if clients may connect.", instance.takes_clients
    )
    yield gauge(
        "boreal_instance_vdl_bytes",
        "The log is durable up to this position, as far as this instance knows.",
        instance.vdl,
    )
    yield gauge(
        "boreal_instance_bundle_end_bytes",
        "The end of the newest bundle: from there on a new instance would have to replay.",
        instance.bundle_end,
    )
    yield gauge(
        "boreal_cache_limit_bytes",
        "Bound on the pages in local files; 0: none.",
        config.cache_bytes,
    )
    evicted_bytes = instance.cache.evicted_bytes if instance.cache else 0
    yield counter(
        "boreal_cache_evicted_bytes_total",
        "Pages taken out of local files to keep within the bound.",
        evicted_bytes,
    )
    if instance.statistics.latest is not None:
        yield from _postgres_metrics(instance.statistics.latest)
    if instance.pages is not None:
        yield from _page_metrics(instance.pages)
    yield from _storage_read_metrics(instance)
    if instance.writer is not None:
        yield from _writer_metrics(instance.writer)
    elif instance.reader is not None:
        yield from _reader_metrics(instance, instance.reader)


# --- PostgreSQL and its pages --------------------------------------------------------------------


def _postgres_metrics(latest: EngineStatistics) -> Iterator[Metric]:
    yield counters(
        "boreal_postgres_transactions_total",
        "Transactions that ended, read-only ones and the agent's own included.",
        ("outcome",),
        [(("commit",), latest.commits), (("rollback",), latest.rollbacks)],
    )
    yield counters(
        "boreal_postgres_blocks_total",
        "Blocks that PostgreSQL asked for, by whether shared_buffers had them.",
        ("found",),
        [(("hit",), latest.blocks_hit), (("read",), latest.blocks_read)],
    )
    yield gauge(
        "boreal_postgres_sessions",
        "Sessions of PostgreSQL, the agent's own included.",
        latest.sessions,
    )


def _page_metrics(pages: PageService) -> Iterator[Metric]:
    counters_now = pages.counters
    yield histograms(
        "boreal_page_request_seconds",
        "What PostgreSQL waited for pages that were not in its local files: they had been fetched "
        "ahead, a storage node was asked, or they had been cut off.",
        ("path",),
        (((path.value,), took) for path, took in counters_now.took.items()),
    )
    yield counters(
        "boreal_page_answers_total",
        "Pages in the answers to these requests; zero: the page was empty.",
        ("content",),
        [(("page",), counters_now.pages), (("zero",), counters_now.zeros)],
    )
    yield counter(
        "boreal_page_failures_total",
        "Requests that ended in an I/O error for PostgreSQL.",
        counters_now.failures,
    )
    yield counter(
        "boreal_page_cuts_total",
        "Truncations and drops of files that PostgreSQL reported.",
        counters_now.cuts,
    )
    if pages.read_point is not None:
        yield gauge(
            "boreal_page_read_point_bytes",
            "The position in the log as of which a writer's missing pages are read.",
            pages.read_point,
        )


def _storage_read_metrics(instance: Instance) -> Iterator[Metric]:
    fleet = instance.fleet
    paths = {"page": fleet.page_reads, "window": fleet.window_reads, "bulk": fleet.bulk_reads}
    yield histograms(
        "boreal_storage_read_seconds",
        "How long storage nodes took to answer reads: of one page, of several, of anything else "
        "(log, bundles, lists of relations).",
        ("kind",),
        (((kind,), path.answers) for kind, path in paths.items()),
    )
    yield counters(
        "boreal_storage_read_failures_total",
        "Reads that a storage node did not serve, so that another one was asked.",
        ("kind",),
        (((kind,), path.failures) for kind, path in paths.items()),
    )
    yield counters(
        "boreal_storage_read_hedges_total",
        "Reads for which a second node was asked because the first took unusually long.",
        ("kind",),
        (((kind,), path.hedges.spent) for kind, path in paths.items() if path.hedges),
    )
    yield gauges(
        "boreal_storage_read_latency_seconds",
        "How long a node takes to answer a read of one page, smoothed; 0: it was not asked yet.",
        ("node",),
        _latencies(fleet.page_reads, list(fleet.members)),
    )


def _latencies(path: ReadPath, nodes: list[NodeName]) -> Iterator[tuple[tuple[str], float]]:
    for node in nodes:
        yield (node,), path.health(node).latency_s


# --- roles ---------------------------------------------------------------------------------------


def _writer_metrics(writer: Writer) -> Iterator[Metric]:
    shipper, lease = writer.shipper, writer.lease
    yield histogram(
        "boreal_commit_latency_seconds",
        "How long log took from its arrival at the agent until it was durable on a write quorum: "
        "what a commit waits for.",
        shipper.durability,
    )
    yield gauge(
        "boreal_writer_log_end_bytes", "How far PostgreSQL has handed out its log.", shipper.end
    )
    yield gauge(
        "boreal_writer_backlog_bytes",
        "Log that waits for a write quorum.",
        max(0, shipper.end - shipper.vdl),
    )
    yield gauge(
        "boreal_writer_backlog_limit_bytes",
        "With so much waiting no more log is taken from PostgreSQL.",
        shipper.window_bytes,
    )
    yield gauge(
        "boreal_writer_lease_held",
        "1 while the writer may serve clients: enough storage nodes answered lately.",
        lease.held(time.monotonic),
    )
    yield gauge(
        "boreal_writer_pgmrpl_bytes",
        "Nobody will ask storage for anything below this position; 0: not known yet.",
        writer.pgmrpl,
    )
    yield histogram(
        "boreal_append_bytes",
        "Log in each append that was sent to a storage node.",
        shipper.batch_bytes,
    )
    yield from _link_metrics(writer)
    yield from _follower_metrics(writer)


def _link_metrics(writer: Writer) -> Iterator[Metric]:
    links, vdl = writer.shipper.links, writer.shipper.vdl
    yield gauges(
        "boreal_link_state",
        "1 for the state of the writer's connection to a storage node.",
        ("node", "state"),
        (((link.node, each.value), each is link.state) for link in links for each in LinkState),
    )
    yield histograms(
        "boreal_link_ack_seconds",
        "How long a storage node took to acknowledge an append with log.",
        ("node",),
        (((link.node,), link.acks) for link in links),
    )
    yield gauges(
        "boreal_link_scl_bytes",
        "How far a storage node has the log, as it acknowledged.",
        ("node",),
        (((link.node,), link.scl) for link in links),
    )
    yield gauges(
        "boreal_link_lag_bytes",
        "Durable log that a storage node lacks.",
        ("node",),
        (((link.node,), max(0, vdl - link.scl)) for link in links),
    )
    yield counters(
        "boreal_link_shipped_bytes_total",
        "Log sent to a storage node.",
        ("node",),
        (((link.node,), link.shipped_bytes) for link in links),
    )
    yield counters(
        "boreal_link_appends_total",
        "Appends with log sent to a storage node.",
        ("node",),
        (((link.node,), link.batches) for link in links),
    )


def _follower_metrics(writer: Writer) -> Iterator[Metric]:
    followers, vdl = writer.publisher.followers, writer.shipper.vdl
    yield gauges(
        "boreal_follower_lag_bytes",
        "Durable log that a reader, which follows this writer, has not replayed as it said last.",
        ("reader",),
        (((each.instance,), max(0, vdl - each.replay)) for each in followers),
    )
    yield gauges(
        "boreal_follower_lag_seconds",
        "How long the oldest log that such a reader received waits there to be replayed.",
        ("reader",),
        (((each.instance,), each.lag_us / 1e6) for each in followers),
    )


def _reader_metrics(instance: Instance, reader: Reader) -> Iterator[Metric]:
    yield gauge(
        "boreal_reader_replayed_bytes",
        "PostgreSQL has replayed up to this position.",
        reader.replayed,
    )
    yield gauge(
        "boreal_reader_lag_bytes",
        "Durable log, as far as this reader knows, that PostgreSQL has not replayed.",
        max(0, instance.vdl - reader.replayed),
    )
    yield gauge(
        "boreal_reader_lag_seconds",
        "How long the oldest log given to PostgreSQL waits to be replayed.",
        reader.lag_us / 1e6,
    )
    yield gauge(
        "boreal_reader_follows", "1 while it gets the log live from the writer.", reader.follows
    )
