"""What a storage node is told at its start, and where it keeps things. Parsed once, passed down."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from boreal.errors import MalformedRequest
from boreal.types import NodeName, VolumeId
from storage_node.pressure import Pressure

RETAIN_LOG_BYTES = 256 * 1024 * 1024
"""How much log below the floor a volume keeps before its pages are stored instead."""

CHAIN_RECORDS = 32
"""How many records may lie between a page and its newest base."""

_VOLUME_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeLayout:
    """The directory of one volume on this node.

    The log process owns `log/`, `state`, `shared` and `bundles/`; the page process `pages/`.
    """

    root: Path

    @property
    def log(self) -> Path:
        """WAL segment files and their checksums."""
        return self.root / "log"

    @property
    def state(self) -> Path:
        """What the segment promised."""
        return self.root / "state"

    @property
    def shared(self) -> Path:
        """Where the two processes tell each other how far they are (storage_node.shared_state)."""
        return self.root / "shared"

    @property
    def bundles(self) -> Path:
        """Contents and manifests."""
        return self.root / "bundles"

    @property
    def pages(self) -> Path:
        """All that is derived from the log."""
        return self.root / "pages"


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageConfig:
    """One storage node."""

    name: NodeName
    zone: str
    data_dir: Path
    host: str
    """To listen on."""
    control: str
    """host:port of the control plane."""
    log_port: int
    """gRPC: StorageLog and Bundles."""
    frames_port: int
    """The framed lane of Append."""
    pages_port: int
    """gRPC: StoragePages, served by the page process."""
    page_frames_port: int
    """The framed lane of GetPages, served by the page process."""
    advertise: str | None = None
    """The host by which others reach this node; None: that it listens on."""
    metrics_port: int | None = None
    """HTTP: metrics of the log process; None: they are not served."""
    pages_metrics_port: int | None = None
    """HTTP: metrics of the page process; None: they are not served."""
    retain_log_bytes: int = RETAIN_LOG_BYTES
    """Log a volume keeps below the floor; more than that is turned into stored pages."""
    chain_records: int = CHAIN_RECORDS
    """A page as many records behind its newest stored version gets another."""
    pressure: Pressure = field(default_factory=Pressure)
    """When the writer is slowed because the page index lags."""
    tls_dir: Path | None = None
    """Who the node's processes are (boreal.rpc.identity); None: unencrypted."""

    def address(self, port: int) -> str:
        """HOST:PORT by which others reach one of its ports."""
        return f"{self.advertise or self.host}:{port}"

    @property
    def volumes_dir(self) -> Path:
        """One directory for each volume, named by its id; a leading dot means it is not one."""
        return self.data_dir / "volumes"

    def volume(self, volume: VolumeId) -> VolumeLayout:
        """Where a volume lives; MalformedRequest if `volume` is no volume id."""
        return VolumeLayout(root=self.volumes_dir / check_volume_id(volume))


def check_volume_id(volume: str) -> VolumeId:
    """Return a volume id that is safe as a directory name; MalformedRequest otherwise."""
    if not _VOLUME_ID.fullmatch(volume):
        raise MalformedRequest(
            f"{volume[:80]!r} is not a volume id: letters, digits, '-' and '_', at most 63"
        )
    return VolumeId(volume)
