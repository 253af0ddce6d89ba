"""A storage node's page process: `start` it from the log process, `main` is what runs in it.

It is a child of the log process and never outlives it: the kernel kills it with its parent, and its
standard input is a pipe whose other end the parent holds, which also carries the wake-ups.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import uvloop

from boreal import logs
from boreal.errors import Internal
from boreal.metrics import served
from boreal.rpc import storage_pb2_grpc
from boreal.rpc.edge import listen, make_server
from boreal.rpc.options import take_identity
from boreal.types import NodeName
from storage_node.config import StorageConfig
from storage_node.page_lane import page_lane
from storage_node.page_metrics import disk_metrics, page_metrics
from storage_node.page_service import PageService
from storage_node.page_volume import PageVolumes

_STOP_S = 5.0
_GRACE_S = 0.5
_NICENESS = 5
"""Commits first: the log process keeps the better claim to the processor."""
_COLLECT_AFTER = 50_000
"""Objects. The index is many small lists without a cycle among them; at Python's own threshold they
are gone through again and again, a tenth of all there is to do."""
_PR_SET_PDEATHSIG = 1
_WAKE_UP = b"\1"


class PageProcess:
    """The parent's handle. Not for several threads."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdin is None:
            raise Internal("the page process was started without its pipe")
        self._process = process
        self._pipe = process.stdin
        os.set_blocking(self._pipe.fileno(), False)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    def notify(self) -> None:
        """Say that a log grew, or that volumes came or went. Never blocks."""
        # A full pipe wakes it as well as one byte more; a closed one is for `poll` to tell.
        if self._pipe.closed:
            return
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe.fileno(), _WAKE_UP)

    def stop(self) -> None:
        """End it, gently first. Returns when it is gone, in a few seconds at most."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._pipe.close()


def start(config: StorageConfig) -> PageProcess:
    """Start a node's page process; returns before it serves.

    Call it from the main thread: the kernel ties the child to the thread that made it.
    """
    settings = {name: getattr(config, name) for name in config.__slots__}
    words = {name: str(value) for name, value in settings.items() if value is not None}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "storage_node.page_process", json.dumps(words)],
        stdin=subprocess.PIPE,
        bufsize=0,
    )
    return PageProcess(process)


def _parse(text: str) -> StorageConfig:
    words = json.loads(text)
    return StorageConfig(
        name=NodeName(words["name"]),
        zone=words["zone"],
        data_dir=Path(words["data_dir"]),
        host=words["host"],
        control=words["control"],
        log_port=int(words["log_port"]),
        frames_port=int(words["frames_port"]),
        pages_port=int(words["pages_port"]),
        page_frames_port=int(words["page_frames_port"]),
        pages_metrics_port=int(port) if (port := words.get("pages_metrics_port")) else None,
        retain_log_bytes=int(words["retain_log_bytes"]),
        chain_records=int(words["chain_records"]),
        tls_dir=Path(path) if (path := words.get("tls_dir")) else None,
    )


async def serve(config: StorageConfig, wake_ups: int) -> None:
    """Serve StoragePages and the lane of GetPages, until SIGTERM comes or `wake_ups`, a pipe's
    descriptor, closes."""
    loop = asyncio.get_running_loop()
    finished, awake = asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, finished.set)

    def hear() -> None:
        if os.read(wake_ups, 4096):
            awake.set()
        else:
            finished.set()

    loop.add_reader(wake_ups, hear)
    server = make_server()
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        volumes = PageVolumes(config, tasks)
        storage_pb2_grpc.add_StoragePagesServicer_to_server(PageService(volumes), server)
        listen(server, f"{config.host}:{config.pages_port}")
        await server.start()
        lane = page_lane(volumes, tasks)
        await lane.start(config.host, config.page_frames_port)
        await stack.enter_async_context(
            served(
                config.host,
                config.pages_metrics_port,
                lambda: page_metrics(volumes),
                about={"component": "pages", "name": config.name, "zone": config.zone},
                aside=lambda: disk_metrics(config),
            )
        )
        listener = tasks.create_task(_wake(volumes, awake))
        await finished.wait()
        loop.remove_reader(wake_ups)
        listener.cancel()
        await lane.stop()
        await server.stop(_GRACE_S)
        await volumes.close()


async def _wake(volumes: PageVolumes, awake: asyncio.Event) -> None:
    volumes.discover()
    while True:
        awake.clear()
        await volumes.wake()
        await awake.wait()


def main() -> None:
    """The child's entry."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    os.nice(_NICENESS)
    gc.set_threshold(_COLLECT_AFTER)
    config = _parse(sys.argv[1])
    logs.configure(f"{config.name}/pages")
    take_identity(config.tls_dir, insecure=config.tls_dir is None)
    uvloop.run(serve(config, sys.stdin.fileno()))


if __name__ == "__main__":
    main()
