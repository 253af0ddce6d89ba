"""How a life begins: PGDATA is laid out anew from what storage has."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import structlog

from boreal.engine import Engine
from boreal.errors import NoBundle, QuorumUnavailable, StaleEpoch
from boreal.types import Epoch, format_lsn
from compute_node import bundle
from compute_node.bundle_choice import BundleChoice
from compute_node.config import ComputeConfig
from compute_node.configuration import prepare_directories, write_configuration
from compute_node.fleet import Fleet
from compute_node.log_source import LogSource, view_log
from compute_node.storage_client import BundleManifest

_RETRY_S = 0.2

_log = structlog.get_logger(__name__)


async def restore(
    config: ComputeConfig, engine: Engine, fleet: Fleet, choice: BundleChoice
) -> tuple[BundleManifest, LogSource]:
    """Lay out PGDATA for a reader; return the bundle it was made from, and the log that follows.

    Waits as long as it takes for a read quorum of storage nodes. `fleet` may act under a newer
    epoch afterwards. NoBundle: there is none at all.
    """
    while True:
        await asyncio.to_thread(prepare_directories, config, engine)
        try:
            return await _restore(config, engine, fleet, choice)
        except StaleEpoch as error:
            # Another writer took over meanwhile: it is that one's volume that is to be served.
            fleet.raise_epoch(Epoch(error.details["promised_epoch"]))
        except QuorumUnavailable as error:
            _log.warning("waiting for storage nodes", reason=error.message)
            await asyncio.sleep(_RETRY_S)


async def _restore(
    config: ComputeConfig, engine: Engine, fleet: Fleet, choice: BundleChoice
) -> tuple[BundleManifest, LogSource]:
    view = view_log(await fleet.positions())
    manifest = await _choose(fleet, choice)
    fleet.follow_lineage(view.lineage.last.epoch)
    restored = await bundle.restore(manifest, fleet, config.pgdata, engine)
    write_configuration(config, engine)
    _log.info(
        "restored",
        redo=format_lsn(manifest.redo),
        end=format_lsn(manifest.end),
        files=len(manifest.files),
        **asdict(restored),
    )
    return manifest, LogSource(fleet, view, durable=manifest.end)


async def _choose(fleet: Fleet, choice: BundleChoice) -> BundleManifest:
    try:
        return await fleet.latest_bundle(choice.max_end)
    except NoBundle:
        if not choice.max_end:
            raise
    choice.begin_again()
    return await fleet.latest_bundle()
