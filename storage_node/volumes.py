"""The segments a storage node holds, by volume."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import structlog

from boreal.errors import BorealError, CorruptData, Internal, UnknownVolume, VolumeMismatch
from boreal.types import Epoch, VolumeId
from storage_node.config import StorageConfig
from storage_node.disk import sync_directory
from storage_node.segment import Segment, VolumeFacts

_log = structlog.get_logger(__name__)


class Volumes:
    """Every segment of this node, opened at its start.

    A volume whose state cannot be trusted is listed in `broken` and refused with that error; the
    others are served.
    """

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        self._segments: dict[str, Segment] = {}
        self.broken: dict[str, BorealError] = {}
        config.volumes_dir.mkdir(parents=True, exist_ok=True)
        for path in sorted(config.volumes_dir.iterdir()):
            if path.name.startswith("."):
                shutil.rmtree(path)  # a creation or removal that a crash interrupted
            else:
                self._open(VolumeId(path.name))

    def _open(self, volume: VolumeId) -> None:
        try:
            self._segments[volume] = Segment(self._config.volume(volume))
        except (BorealError, OSError, ValueError, KeyError) as error:
            _log.error("a volume cannot be opened", volume=volume, exc_info=error)
            self.broken[volume] = (
                error
                if isinstance(error, BorealError)
                else CorruptData(f"volume {volume} cannot be opened: {error}")
            )

    def __iter__(self) -> Iterator[tuple[VolumeId, Segment]]:
        """The served segments at this moment."""
        return iter([(VolumeId(volume), segment) for volume, segment in self._segments.items()])

    def find(self, volume: str) -> Segment:
        """The segment of a volume; UnknownVolume, or why it is broken."""
        segment = self._segments.get(volume)
        if segment is None:
            raise self.broken.get(volume) or UnknownVolume(
                f"this storage node holds nothing of volume {volume[:80]!r}"
            )
        return segment

    def create(self, volume: VolumeId, epoch: Epoch, facts: VolumeFacts) -> Segment:
        """Make a volume's segment, or find it made; VolumeMismatch if it was made differently."""
        layout = self._config.volume(volume)
        if volume in self.broken:
            raise self.broken[volume]
        segment = self._segments.get(volume)
        if segment is None:
            segment = self._segments[volume] = Segment.create(layout, epoch, facts)
        elif segment.facts != facts:
            raise VolumeMismatch(
                f"volume {volume} exists here as {segment.facts}, not {facts}; drop it first"
            )
        segment.check_epoch(epoch)
        return segment

    def drop(self, volume: VolumeId, epoch: Epoch) -> Path | None:
        """Remove a volume; return what is left to be deleted, None if there was nothing."""
        layout = self._config.volume(volume)
        segment = self._segments.get(volume)
        if segment is not None:
            segment.check_epoch(epoch)
            segment.close(dropped=True)
            del self._segments[volume]
        elif self.broken.pop(volume, None) is None:
            return None
        gone = layout.root.with_name(f".dropped-{volume}")
        if gone.exists():
            raise Internal(f"{gone} is still being deleted; try again in a moment")
        layout.root.rename(gone)
        sync_directory(gone.parent)
        return gone

    def close(self) -> None:
        """Close every segment."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
