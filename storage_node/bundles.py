"""What a compute node needs besides pages and log, kept by content.

`contents/<sha256>` holds a file's bytes under their hash, `manifests/<end LSN>-<epoch>` names the
contents of one bundle. Everything is synced before it is acknowledged and verified when it is read.
Methods block on the disk: call them from a worker thread, never on the loop that acknowledges
appends.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from google.protobuf.message import DecodeError
from google_crc32c import value

from boreal.errors import CorruptData, MalformedRequest, NoBundle, OversizeRequest
from boreal.rpc import storage_pb2
from boreal.types import KEPT_BUNDLES, Lsn, format_lsn
from storage_node.disk import sync_directory, write_durably

MAX_CONTENT_BYTES = 64 * 1024 * 1024
"""The largest file of a bundle is the FSM fork of a relation: 64 MiB of it cover 256 GiB."""
_HASH_BYTES = 32
_CRC_BYTES = 4
_MANIFEST = re.compile(r"([0-9A-F]{16})-([0-9A-F]{16})")


class BundleStore:
    """The bundles of one volume.

    Invariant: every content that a kept manifest names is stored. Contents that none names are
    removed when a manifest is put; so whoever takes bundles of a volume does one at a time, which a
    volume's only writer does.
    """

    def __init__(self, directory: Path) -> None:
        self._contents = directory / "contents"
        self._manifests = directory / "manifests"
        self._oldest_redo: Lsn | None = None
        self._changing = threading.Lock()
        """Calls come from worker threads; what one collects another may be about to name."""

    @classmethod
    def create(cls, directory: Path) -> Self:
        """Make an empty store."""
        store = cls(directory)
        store._contents.mkdir(parents=True)
        store._manifests.mkdir()
        return store

    @property
    def oldest_redo(self) -> Lsn:
        """The lowest LSN that a kept bundle is replayed from; 0: there is none, or one is damaged.

        Cheap: looked up once, then kept up to date.
        """
        if self._oldest_redo is None:
            try:
                manifests = [read_manifest(path) for path in self.manifest_files()]
            except CorruptData:
                return Lsn(0)
            self._oldest_redo = _oldest_redo(manifests)
        return self._oldest_redo

    def manifest_files(self) -> list[Path]:
        """Where the kept manifests are, the newest first."""
        return [path for _, path in self._newest_first()]

    def missing(self, hashes: Iterable[bytes]) -> list[bytes]:
        """Those of the hashes whose content is not stored."""
        return [digest for digest in hashes if not self._content(digest).exists()]

    def receive(self, digest: bytes) -> IncomingContent:
        """Begin to store one content."""
        return IncomingContent(self._content(digest), digest)

    def read(self, digest: bytes) -> bytes:
        """One content. NoBundle if it is not stored, CorruptData if it does not match."""
        path = self._content(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise NoBundle(f"no content {digest.hex()} is stored here") from error
        if hashlib.sha256(data).digest() != digest:
            raise CorruptData(f"{path} does not match its hash; take it from another storage node")
        return data

    def put_manifest(self, manifest: storage_pb2.BundleManifest) -> None:
        """Make a bundle known, then forget what is older than the newest few. Durable."""
        with self._changing:
            missing = self.missing(file.sha256 for file in manifest.files if file.sha256)
            if missing:
                raise MalformedRequest(
                    f"{len(missing)} contents of the bundle are not stored here; put them first"
                )
            body = manifest.SerializeToString(deterministic=True)
            name = f"{manifest.end_lsn:016X}-{manifest.epoch:016X}"
            write_durably(self._manifests / name, value(body).to_bytes(_CRC_BYTES, "big") + body)
            self._collect()

    def manifest(self, max_end_lsn: Lsn) -> storage_pb2.BundleManifest:
        """The newest bundle that ends at or below `max_end_lsn` (0: no bound).

        NoBundle if there is none, CorruptData if it does not match its checksum.
        """
        for end, path in self._newest_first():
            if not max_end_lsn or end <= max_end_lsn:
                return read_manifest(path)
        bound = f" at or below {format_lsn(max_end_lsn)}" if max_end_lsn else ""
        raise NoBundle(f"no bundle{bound} is stored here")

    def _content(self, digest: bytes) -> Path:
        if len(digest) != _HASH_BYTES:
            raise MalformedRequest(f"a SHA-256 has {_HASH_BYTES} bytes, not {len(digest)}")
        return self._contents / digest.hex()

    def _newest_first(self) -> list[tuple[int, Path]]:
        found = [
            (int(match[1], 16), int(match[2], 16), path)
            for path in self._manifests.iterdir()
            if (match := _MANIFEST.fullmatch(path.name))
        ]
        return [(end, path) for end, _, path in sorted(found, reverse=True)]

    def _collect(self) -> None:
        """Remove old manifests, then the contents that no kept one names."""
        paths = self.manifest_files()
        try:
            kept = [read_manifest(path) for path in paths[:KEPT_BUNDLES]]
        except CorruptData:
            self._oldest_redo = Lsn(0)
            return  # what it names cannot be known, so nothing may go until it is out of the way
        for path in paths[KEPT_BUNDLES:]:
            path.unlink()
        sync_directory(self._manifests)
        self._oldest_redo = _oldest_redo(kept)
        named = {file.sha256.hex() for manifest in kept for file in manifest.files}
        for path in self._contents.iterdir():
            if path.name not in named:
                path.unlink()


class IncomingContent:
    """One content on its way in. Nothing of it is seen before `finish`."""

    def __init__(self, path: Path, digest: bytes) -> None:
        self._path = path
        self._digest = digest
        self._chunks: list[bytes] = []
        self._size_bytes = 0

    def add(self, data: bytes) -> None:
        """The next chunk."""
        self._size_bytes += len(data)
        if self._size_bytes > MAX_CONTENT_BYTES:
            raise OversizeRequest(
                f"a content has at most {MAX_CONTENT_BYTES} bytes", limit_bytes=MAX_CONTENT_BYTES
            )
        self._chunks.append(data)

    def finish(self) -> None:
        """Store it. Durable. MalformedRequest if the bytes are not those of the hash."""
        whole = hashlib.sha256()
        for chunk in self._chunks:
            whole.update(chunk)
        if whole.digest() != self._digest:
            raise MalformedRequest(
                f"the content sent has hash {whole.hexdigest()}, not {self._digest.hex()}"
            )
        write_durably(self._path, b"".join(self._chunks))


def _oldest_redo(manifests: Iterable[storage_pb2.BundleManifest]) -> Lsn:
    return Lsn(min((manifest.redo_lsn for manifest in manifests), default=0))


def read_manifest(path: Path) -> storage_pb2.BundleManifest:
    """One manifest file; CorruptData if it does not match its checksum."""
    data = path.read_bytes()
    crc, body = data[:_CRC_BYTES], data[_CRC_BYTES:]
    if crc != value(body).to_bytes(_CRC_BYTES, "big"):
        raise CorruptData(f"{path} does not match its checksum; take it from another storage node")
    try:
        return storage_pb2.BundleManifest.FromString(body)
    except DecodeError as error:
        raise CorruptData(f"{path} is not a manifest") from error
