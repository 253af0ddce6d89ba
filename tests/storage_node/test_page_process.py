"""Goal: the page process comes and goes without losing anything, and never outlives its parent.

Method: the real process, killed with SIGKILL in the middle of its work.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from boreal.rpc import storage_pb2, storage_pb2_grpc
from boreal.rpc.edge import fork_to_wire, open_channel, volume_ref
from boreal.types import PAGE_BYTES, Fork, Lsn, RelationFork
from boreal.waiting import wait_until
from storage_node import page_process
from storage_node.config import StorageConfig
from storage_node.page_process import PageProcess
from tests.storage_node.node_process import free_ports
from tests.storage_node.page_lane_kit import page_lane_client
from tests.storage_node.page_volume_kit import (
    EPOCH,
    VOLUME,
    WAIT_S,
    append,
    import_messages,
    make_segment,
    storage_config,
    tell_vdl,
)
from tests.storage_node.recorded_run import RecordedRun, Snapshot


@pytest.fixture
def config(tmp_path: Path) -> StorageConfig:
    return storage_config(tmp_path, *free_ports(2))


@contextmanager
def _running(config: StorageConfig) -> Iterator[PageProcess]:
    process = page_process.start(config)
    try:
        yield process
    finally:
        process.stop()


@asynccontextmanager
async def _client(config: StorageConfig) -> AsyncIterator[storage_pb2_grpc.StoragePagesAsyncStub]:
    channel = open_channel(f"{config.host}:{config.pages_port}")
    try:
        yield storage_pb2_grpc.StoragePagesStub(channel)
    finally:
        await channel.close(None)


def _wait(condition: Callable[[], bool]) -> None:
    wait_until(condition, timeout_s=WAIT_S, otherwise=lambda: AssertionError("in vain"))


async def _import(config: StorageConfig, run: RecordedRun) -> None:
    async with _client(config) as stub:
        await stub.ImportPages(import_messages(run), timeout=WAIT_S, wait_for_ready=True)


async def test_killed_in_the_middle_of_its_work_it_continues(
    config: StorageConfig, recorded_run: RecordedRun
) -> None:
    segment = make_segment(config, recorded_run)
    last = recorded_run.snapshots[-1]
    append(segment, recorded_run, last.lsn, recorded_run.import_lsn)
    with _running(config) as process:
        await _import(config, recorded_run)
        tell_vdl(segment, last.lsn)
        process.notify()
        some = Lsn(recorded_run.import_lsn + (10 << 20))
        _wait(lambda: segment.shared.indexed > some)
        os.kill(process.pid, 9)
        _wait(lambda: process.poll() is not None)
    killed_at = segment.shared.indexed
    fork = RelationFork(1663, 5, 1259, Fork.MAIN)
    with _running(config):
        _wait(lambda: segment.shared.indexed > killed_at)
        # Hint bits aside: tests/storage_node/test_materialize.py compares under masks.
        await _same_lsns(config, fork, last)
    assert killed_at < last.lsn, "it was killed too late to prove anything"
    segment.close()


async def test_killed_while_it_retires_log_it_continues(
    tmp_path: Path, recorded_run: RecordedRun
) -> None:
    """SIGKILL again and again, at any moment of sealing, storing and retiring."""
    config = replace(
        storage_config(tmp_path, *free_ports(2)), retain_log_bytes=4 << 20, chain_records=8
    )
    segment = make_segment(config, recorded_run)
    last = recorded_run.snapshots[-1]
    append(segment, recorded_run, last.lsn)
    with _running(config):
        await _import(config, recorded_run)
    segment.shared.floor = last.lsn
    chance = random.Random(4)
    for _ in range(8):
        with _running(config) as process:
            before = segment.shared.retired
            retired = Lsn(before + chance.randrange(2 << 20))
            wait_s = chance.random() * 3
            async with _client(config) as stub:
                request = storage_pb2.GetIndexStateRequest(volume=volume_ref(VOLUME, EPOCH))
                await stub.GetIndexState(request, timeout=WAIT_S, wait_for_ready=True)
            with suppress(AssertionError):
                wait_until(
                    lambda goal=retired: segment.shared.retired > goal,  # type: ignore[misc]
                    timeout_s=wait_s,
                    otherwise=AssertionError,
                )
            os.kill(process.pid, 9)
            _wait(lambda gone=process: gone.poll() is not None)  # type: ignore[misc]
    with _running(config):
        _wait(lambda: segment.shared.floor - segment.shared.retired <= 5 << 20)
        for number in (1259, 1249, 1255, 2662):
            fork = RelationFork(1663, 5, number, Fork.MAIN)
            if fork in last.files:
                await _same_lsns(config, fork, last)
    segment.close()


async def _same_lsns(config: StorageConfig, fork: RelationFork, snapshot: Snapshot) -> None:
    request = storage_pb2.GetPagesRequest(
        volume=volume_ref(VOLUME, EPOCH),
        fork=fork_to_wire(fork),
        count=len(snapshot.files[fork]) // PAGE_BYTES,
        lsn=snapshot.lsn,
    )
    async with page_lane_client(config.page_frames_port) as client:
        images = await client.images(client.begin(request))
    assert all(exists for each in images for exists in each.exists)
    pages = b"".join(each.pages for each in images)
    wanted = snapshot.files[fork]
    assert len(pages) == len(wanted)
    for at in range(0, len(pages), PAGE_BYTES):
        assert pages[at : at + 8] == wanted[at : at + 8], f"{fork}:{at // PAGE_BYTES}"


async def test_it_ends_when_asked(config: StorageConfig, recorded_run: RecordedRun) -> None:
    segment = make_segment(config, recorded_run)
    with _running(config) as process:
        await _import(config, recorded_run)
        assert process.poll() is None
        process.stop()
        assert process.poll() == 0
        process.notify()
    segment.close()


_PARENT = """
import os, sys
from pathlib import Path
from storage_node import page_process
from tests.storage_node.page_volume_kit import storage_config
process = page_process.start(storage_config(Path(sys.argv[1]), *map(int, sys.argv[2:])))
print(process.pid, flush=True)
sys.stdin.read()
os.kill(os.getpid(), 9)
"""


def test_it_dies_with_its_parent(config: StorageConfig) -> None:
    ports = (config.pages_port, config.page_frames_port)
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(config.data_dir), *map(str, ports)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.stdin.close()
        parent.wait(WAIT_S)
    _wait(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
