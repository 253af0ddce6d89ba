"""A small program that looks like PostgreSQL to the shim, and an agent for it, for tests."""

from __future__ import annotations

import asyncio
import json
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from boreal.types import PAGE_BYTES
from compute_node import shim
from compute_node.page_protocol import (
    REQUEST_BYTES,
    Operation,
    Outcome,
    ShimRequest,
    answer,
    answer_pages,
)

_FAKE_ENGINE = """
#include <stdbool.h>
#include <stdint.h>
void *UsedShmemSegAddr = &UsedShmemSegAddr;
bool in_recovery = true;
bool RecoveryInProgress(void) { return in_recovery; }
uint64_t GetXLogReplayRecPtr(uint32_t *timeline) { (void) timeline; return 1000; }
uint64_t GetXLogInsertRecPtr(void) { return 2000; }
"""

_DRIVER = """
import ctypes, json, os, signal
libc = ctypes.CDLL(None, use_errno=True)  # resolves names as PostgreSQL would: ours first
libc.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
libc.pread.restype = libc.read.restype = ctypes.c_ssize_t
libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.ftruncate.argtypes = [ctypes.c_int, ctypes.c_long]
def opened(path, flags=os.O_RDWR):
    return libc.open(path.encode(), flags)
def pread(fd, length, offset):
    buffer = ctypes.create_string_buffer(length)
    got = libc.pread(fd, buffer, length, offset)
    return ctypes.get_errno() if got < 0 else buffer.raw[:got].hex()
def read(fd, length):
    buffer = ctypes.create_string_buffer(length)
    got = libc.read(fd, buffer, length)
    return ctypes.get_errno() if got < 0 else buffer.raw[:got].hex()
def become_writer():
    ctypes.c_bool.in_dll(libc, "in_recovery").value = False
"""


def build_fake_engine(folder: Path) -> Path:
    """A library that makes a program look like PostgreSQL to the shim."""
    (folder / "engine.c").write_text(_FAKE_ENGINE)
    subprocess.run(
        [*shim.compiler(), "-shared", "-fPIC", "-o", folder / "engine.so", folder / "engine.c"],
        check=True,
    )
    return folder / "engine.so"


MAGIC = 0x32534742


def page_of(block: int) -> bytes:
    return struct.pack("<I", block + 1) * (PAGE_BYTES // 4)


async def give_page(request: ShimRequest) -> bytes:
    """A well-behaved agent's answer."""
    if request.operation is Operation.CUT:
        return answer(Outcome.DONE)
    first = request.key.block
    return answer_pages([page_of(block) for block in range(first, first + request.window)])


@asynccontextmanager
async def agent(
    path: Path, reply: Callable[[ShimRequest], Awaitable[bytes]] = give_page
) -> AsyncIterator[list[ShimRequest]]:
    """An agent that sends what `reply` gives, or hangs up if that is nothing."""
    requests: list[ShimRequest] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                requests.append(ShimRequest.unpack(await reader.readexactly(REQUEST_BYTES)))
                if requests[-1].operation is Operation.PREFETCH:
                    continue
                if not (given := await reply(requests[-1])):
                    break
                writer.write(given)
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield requests
    finally:
        server.close()


class Driver:
    """Runs Python snippets as if they were PostgreSQL: the shim loaded, PGDATA as directory."""

    def __init__(self, data: Path, libraries: list[Path]) -> None:
        self.data = data
        self.socket_path = data / "pages"
        self._libraries = libraries
        self.variables: dict[str, str] = {}
        (data / "base" / "5").mkdir(parents=True)
        (data / "global").mkdir()

    def relation(self, name: str, blocks: int) -> Path:
        path = self.data / name
        with path.open("wb") as file:
            file.truncate(blocks * PAGE_BYTES)
        return path

    async def run(self, code: str) -> Any:
        """The value that `code` leaves in `result`."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", f"{_DRIVER}\n{code}\nprint(json.dumps(result))"),
            cwd=self.data,
            env={
                "LD_PRELOAD": ":".join(map(str, self._libraries)),
                shim.SOCKET_VARIABLE: str(self.socket_path),
                **self.variables,
            },
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0
        return json.loads(output)
