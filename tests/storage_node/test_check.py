"""Goal: the offline check finds every kind of damage and says what to do; none where there is none.

Method: a node's directory made by the real parts out of a log that a stock PostgreSQL wrote (with a
change of timeline in it), damaged in the files. The command runs as a process.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from google_crc32c import value

from boreal.pages import set_page_lsn
from boreal.rpc import storage_pb2
from boreal.types import PAGE_BYTES, WAL_SEGMENT_BYTES, Fork, RelationFork, wal_segment_start
from storage_node.check import check_volume
from storage_node.check_report import Damage
from storage_node.config import VolumeLayout
from storage_node.log import find_segments
from storage_node.page_store import PageStore
from storage_node.segment import Segment
from storage_node.segment_file import sidecar_path
from tests.storage_node.segment_kit import (
    Wal,
    append,
    change,
    engine_wal,
    new_segment,
)

TABLE = RelationFork(1663, 5, 16384, Fork.MAIN)
CONTENT = b"the content of a small file" * 100


class _Quiet:
    """Counts what it hears."""

    def __init__(self) -> None:
        self.damages: list[Damage] = []
        self.read_bytes = 0

    def found(self, damage: Damage) -> None:
        self.damages.append(damage)

    def advanced(self, size_bytes: int) -> None:
        self.read_bytes += size_bytes


class StoppedNode:
    """A node's directory with one volume in it."""

    def __init__(self, data_dir: Path, wal: Wal) -> None:
        self.data_dir = data_dir
        self.wal = wal
        (data_dir / "volumes").mkdir(parents=True)
        (data_dir / "lock").touch()
        segment = new_segment(data_dir / "volumes", wal.start)
        append(segment, wal, wal.switch)
        segment.adopt(wal.second.last.epoch, wal.second)
        append(segment, wal, wal.end, epoch=2)
        self.layout = segment.layout
        self._put_bundle(segment)
        self._import()
        segment.close()

    def copied(self, data_dir: Path) -> StoppedNode:
        """Another node with the same in its directory."""
        shutil.copytree(self.data_dir, data_dir)
        copy = object.__new__(StoppedNode)
        copy.data_dir, copy.wal = data_dir, self.wal
        copy.layout = VolumeLayout(root=data_dir / self.layout.root.relative_to(self.data_dir))
        return copy

    def _put_bundle(self, segment: Segment) -> None:
        digest = hashlib.sha256(CONTENT).digest()
        content = segment.bundles.receive(digest)
        content.add(CONTENT)
        content.finish()
        manifest = storage_pb2.BundleManifest(
            redo_lsn=self.wal.start, end_lsn=self.wal.end, epoch=2
        )
        manifest.files.add(path="global", mode=0o700)
        manifest.files.add(path="global/x", sha256=digest, size_bytes=len(CONTENT))
        segment.bundles.put_manifest(manifest)

    def _import(self) -> None:
        self.layout.pages.mkdir(exist_ok=True)
        store = PageStore(self.layout.pages)
        store.begin()
        page = bytearray(PAGE_BYTES)
        set_page_lsn(page, 77)
        store.add(TABLE, 0, bytes(page) * 20)
        store.seal(self.wal.start)
        store.close()

    def damages(self) -> list[Damage]:
        return check_volume(self.layout, _Quiet()).damages

    def command(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "storage_node.check", str(self.data_dir)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture(scope="module")
def wal() -> Wal:
    return engine_wal()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, wal: Wal) -> StoppedNode:
    return StoppedNode(tmp_path_factory.mktemp("made") / "sn-1", wal)


@pytest.fixture
def node(made: StoppedNode, tmp_path: Path) -> StoppedNode:
    return made.copied(tmp_path / "sn-1")


def test_a_sound_directory(node: StoppedNode, wal: Wal) -> None:
    watcher = _Quiet()
    report = check_volume(node.layout, watcher)
    assert report.damages == watcher.damages == []
    assert report.counts["log pages"] == -(-(wal.end - wal.start) // PAGE_BYTES)
    # The last record of a log may be an XLOG_SWITCH whose segment goes on.
    assert len(wal.record_ends) - report.counts["records"] in (0, 1)
    assert report.counts["imported pages"] == 20
    assert (report.counts["bundles"], report.counts["bundle contents"]) == (1, 1)
    assert watcher.read_bytes > wal.end - wal.start


def test_a_volume_that_is_only_being_made(tmp_path: Path, wal: Wal) -> None:
    segment = new_segment(tmp_path, wal.start)
    segment.close()
    assert check_volume(segment.layout, _Quiet()).damages == []


def test_checking_changes_nothing(node: StoppedNode) -> None:
    def files() -> dict[str, str]:
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in node.data_dir.rglob("*")
            if path.is_file() and path.name != "lock.mdb"
        }

    before = files()
    assert node.damages() == []
    assert files() == before
    segment = Segment(node.layout)  # and the node starts as ever
    assert segment.state.scl == node.wal.end
    segment.close()


def _flip(path: Path, offset: int) -> None:
    change(path, offset, bytes([path.read_bytes()[offset] ^ 0x40]))


def log_file(node: StoppedNode, lsn: int) -> Path:
    return find_segments(node.layout.log)[wal_segment_start(lsn)]


def sidecar_file(node: StoppedNode, lsn: int) -> Path:
    return sidecar_path(node.layout.log, wal_segment_start(lsn))


def _log_page(node: StoppedNode) -> None:
    _flip(log_file(node, node.wal.start), 9 * PAGE_BYTES + 99)


def _last_page(node: StoppedNode) -> None:
    _flip(log_file(node, node.wal.end), node.wal.end % WAL_SEGMENT_BYTES - 3)


def _sidecar_gone(node: StoppedNode) -> None:
    sidecar_file(node, node.wal.start).unlink()


def _segment_gone(node: StoppedNode) -> None:
    log_file(node, node.wal.start + WAL_SEGMENT_BYTES).unlink()


def _segment_short(node: StoppedNode) -> None:
    with log_file(node, node.wal.start).open("r+b") as file:
        file.truncate(WAL_SEGMENT_BYTES // 2)


def _state(node: StoppedNode) -> None:
    _flip(node.layout.state, 30)


def _lineage(node: StoppedNode) -> None:
    """A history that was another's: the pages tell."""
    body = node.layout.state.read_bytes()[9:-1]
    body = body.replace(str(node.wal.switch).encode(), str(node.wal.start + 8192).encode())
    node.layout.state.write_bytes(b"%08x %s\n" % (value(body), body))


def _manifest(node: StoppedNode) -> None:
    (path,) = (node.layout.bundles / "manifests").iterdir()
    _flip(path, 6)


def _content(node: StoppedNode) -> None:
    (path,) = (node.layout.bundles / "contents").iterdir()
    _flip(path, 100)


def _content_gone(node: StoppedNode) -> None:
    (path,) = (node.layout.bundles / "contents").iterdir()
    path.unlink()


def _seal(node: StoppedNode) -> None:
    _flip(node.layout.pages / "imports.seal", 6)


def _imported_page(node: StoppedNode) -> None:
    path = node.layout.pages / "imports" / "data.mdb"
    lsn = (77).to_bytes(4, "little")
    at = path.read_bytes().index(b"\0\0\0\0" + lsn + bytes(8))
    change(path, at + 4, b"\x4e")


@pytest.mark.parametrize(
    ("damage", "words", "remedy"),
    [
        (_log_page, "does not match its checksum", "stopped peer"),
        (_last_page, "does not match its checksum", "stopped peer"),
        (_sidecar_gone, "no checksums", ".crc file"),
        (_segment_gone, "missing", "stopped peer"),
        (_segment_short, "before what was acknowledged", "stopped peer"),
        (_state, "state file", "stopped"),
        (_lineage, "by the lineage", "stopped peer"),
        (_manifest, "does not match its checksum", "bundles/manifests/"),
        (_content, "does not match its hash", "bundles/contents/"),
        (_content_gone, "no content", "bundles/contents/"),
        (_seal, "imports.seal is damaged", "pages/imports"),
        (_imported_page, "imported page", "pages/imports"),
    ],
)
def test_every_damage_is_found(
    node: StoppedNode, damage: Callable[[StoppedNode], None], words: str, remedy: str
) -> None:
    damage(node)
    found = node.damages()
    assert found
    assert all(each.volume == "vol-1" for each in found)
    assert any(words in each.what and remedy in each.remedy for each in found), found


def test_the_records_are_taken_up_again_behind_a_damage(node: StoppedNode, wal: Wal) -> None:
    _log_page(node)
    report = check_volume(node.layout, _Quiet())
    assert len(report.damages) == 1
    assert report.counts["records"] > 0.9 * len(wal.record_ends)


def test_a_wrong_record_under_right_checksums_is_found(node: StoppedNode) -> None:
    path, sidecar = (file(node, node.wal.start) for file in (log_file, sidecar_file))
    data = bytearray(path.read_bytes())
    data[5 * PAGE_BYTES + 4000] ^= 1
    path.write_bytes(data)
    page = bytes(data[5 * PAGE_BYTES : 6 * PAGE_BYTES])
    change(sidecar, 64 + 4 * 5, value(page).to_bytes(4, "little"))
    (found,) = node.damages()
    assert "does not decode" in found.what


def test_a_bundle_without_its_log(node: StoppedNode, wal: Wal) -> None:
    segment = Segment(node.layout)
    manifest = storage_pb2.BundleManifest(redo_lsn=wal.start - 8, end_lsn=wal.end + 8, epoch=2)
    segment.bundles.put_manifest(manifest)
    segment.close()
    (found,) = node.damages()
    assert "the log begins at" in found.what


# --- the command ---------------------------------------------------------------------------------


def test_the_command_tells_and_fails(node: StoppedNode) -> None:
    sound = node.command()
    assert sound.returncode == 0, sound.stderr
    assert "0 damages" in sound.stdout
    assert "pages/s" in sound.stdout
    _content(node)
    damaged = node.command()
    assert damaged.returncode == 1
    assert "1 damages" in damaged.stdout
    assert "bundles/contents/" in damaged.stdout


def test_a_running_node_is_refused(node: StoppedNode) -> None:
    program = (
        "import sys; from pathlib import Path; from storage_node.__main__ import only_process_of\n"
        "with only_process_of(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(node.data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "held\n"
        refused = node.command()
        assert running.stdin is not None
        running.stdin.close()
    assert refused.returncode == 2
    assert "runs" in refused.stderr
    assert "boreal verify" in refused.stderr


@pytest.mark.parametrize("made", [(), ("volumes",)])
def test_what_is_no_stopped_node_is_refused(tmp_path: Path, made: tuple[str, ...]) -> None:
    for name in made:
        (tmp_path / name).mkdir()
    refused = subprocess.run(
        [sys.executable, "-m", "storage_node.check", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 2
    assert "error:" in refused.stderr
