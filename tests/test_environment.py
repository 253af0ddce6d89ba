"""Processes can be told everything by the environment, and by which name others reach them.

Method: a real control plane and a real storage node, started as containers start them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from boreal.cluster import HOST, free_ports
from boreal.command.remote import Outside, connect, if_reachable
from boreal.errors import BorealError
from boreal.rpc import control_pb2
from boreal.rpc.health import check


@contextmanager
def process(module: str, **settings: object) -> Iterator[None]:
    settings["insecure"] = 1
    told = {f"BOREAL_{name.upper()}": str(value) for name, value in settings.items()}
    running = subprocess.Popen([sys.executable, "-P", "-m", module], env={**os.environ, **told})
    try:
        yield
    finally:
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0


async def test_a_node_registers_under_the_name_it_is_given(tmp_path: Path) -> None:
    control, log, frames, pages, page_frames = free_ports(5)
    address = f"{HOST}:{control}"
    with (
        process("control_plane", data_dir=tmp_path / "control", port=control),
        process(
            "storage_node",
            name="sn-1",
            zone="a",
            data_dir=tmp_path / "sn-1",
            control=address,
            host="0.0.0.0",
            advertise="localhost",
            log_port=log,
            frames_port=frames,
            pages_port=pages,
            page_frames_port=page_frames,
        ),
    ):
        async with asyncio.timeout(30), connect(Outside(control_address=address)) as remote:
            found: control_pb2.ClusterStatus | None = None
            while found is None or not found.storage:
                found = await if_reachable(remote.cluster_status())
            addresses = found.storage[0].node.addresses
            assert addresses.log == f"localhost:{log}"
            assert addresses.frames == f"localhost:{frames}"
            assert addresses.pages == f"localhost:{pages}"
            assert addresses.page_frames == f"localhost:{page_frames}"
            for asked in (address, addresses.log):
                await check(asked, ready=False, within_s=10)
            while not await ready(addresses.log):
                await asyncio.sleep(0.05)


async def ready(address: str) -> bool:
    try:
        await check(address, ready=True, within_s=10)
    except BorealError:
        return False
    return True
