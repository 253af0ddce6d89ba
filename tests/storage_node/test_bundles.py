"""Bundles are kept by content, whole, for the newest few; what does not match is not handed out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from boreal.errors import CorruptData, MalformedRequest, NoBundle, OversizeRequest
from boreal.rpc import storage_pb2
from boreal.types import KEPT_BUNDLES, Lsn
from storage_node.bundles import MAX_CONTENT_BYTES, BundleStore


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore.create(tmp_path / "bundles")


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def put(store: BundleStore, *chunks: bytes) -> bytes:
    name = digest(b"".join(chunks))
    incoming = store.receive(name)
    for chunk in chunks:
        incoming.add(chunk)
    incoming.finish()
    return name


def manifest(end: int, *hashes: bytes) -> storage_pb2.BundleManifest:
    return storage_pb2.BundleManifest(
        end_lsn=end,
        epoch=1,
        files=[
            storage_pb2.BundleFile(path="pg_xact"),
            *(storage_pb2.BundleFile(path=f"f{n}", sha256=h) for n, h in enumerate(hashes)),
        ],
    )


def test_contents_come_back_and_only_missing_ones_are_asked_for(store: BundleStore) -> None:
    name = put(store, b"one", b"two")
    assert store.read(name) == b"onetwo"
    other = digest(b"other")
    assert store.missing([name, other]) == [other]
    assert store.read(put(store)) == b""


def test_the_newest_manifest_at_or_below_the_bound(store: BundleStore) -> None:
    with pytest.raises(NoBundle):
        store.manifest(Lsn(0))
    name = put(store, b"x")
    for end in (100, 300, 200):
        store.put_manifest(manifest(end, name))
    assert [store.manifest(Lsn(bound)).end_lsn for bound in (0, 300, 299, 100)] == [
        300,
        300,
        200,
        100,
    ]
    with pytest.raises(NoBundle):
        store.manifest(Lsn(99))


def test_old_manifests_and_what_only_they_name_are_collected(store: BundleStore) -> None:
    kept = put(store, b"in all")
    own = []
    for end in range(1, KEPT_BUNDLES + 3):
        own.append(put(store, b"%d" % end))
        store.put_manifest(manifest(end, kept, own[-1]))
    assert store.missing([kept, *own]) == own[:2]
    with pytest.raises(NoBundle):
        store.manifest(Lsn(2))


def test_the_oldest_kept_bundle_says_where_replay_may_start(
    store: BundleStore, tmp_path: Path
) -> None:
    assert store.oldest_redo == 0
    for end in range(10, 10 * (KEPT_BUNDLES + 3), 10):
        bundle = manifest(end)
        bundle.redo_lsn = end - 3
        store.put_manifest(bundle)
        kept = max(10, end - 10 * (KEPT_BUNDLES - 1))
        assert store.oldest_redo == kept - 3
        assert BundleStore(tmp_path / "bundles").oldest_redo == kept - 3
    for path in (tmp_path / "bundles" / "manifests").iterdir():
        path.write_bytes(b"damaged")
    assert BundleStore(tmp_path / "bundles").oldest_redo == 0


def test_a_manifest_needs_its_contents(store: BundleStore) -> None:
    with pytest.raises(MalformedRequest):
        store.put_manifest(manifest(1, digest(b"never sent")))


def test_what_does_not_match_is_refused_or_told(store: BundleStore, tmp_path: Path) -> None:
    incoming = store.receive(digest(b"right"))
    incoming.add(b"wrong")
    with pytest.raises(MalformedRequest):
        incoming.finish()
    for name in (b"", b"short"):
        with pytest.raises(MalformedRequest):
            store.read(name)
    with pytest.raises(NoBundle):  # another node may have it
        store.read(digest(b"unknown"))
    incoming = store.receive(digest(b""))
    with pytest.raises(OversizeRequest):
        incoming.add(bytes(MAX_CONTENT_BYTES + 1))

    name = put(store, b"content")
    store.put_manifest(manifest(5, name))
    (tmp_path / "bundles" / "contents" / name.hex()).write_bytes(b"contenT")
    with pytest.raises(CorruptData):
        store.read(name)
    (path,) = (tmp_path / "bundles" / "manifests").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptData):
        store.manifest(Lsn(0))
    put(store, b"content")  # sent again, it is whole again
    assert store.read(name) == b"content"
