"""The page shim: what it promises, and how it is built.

A library that is LD_PRELOADed into stock PostgreSQL 16, in three parts.

`boreal_shim.c`: with `SOCKET_VARIABLE` set to the path of the agent's unix socket it turns PGDATA's
relation files into a cache of the volume: a block that reads as all zeros is asked for
(`compute_node.page_service` answers), alone or, when misses follow one another, with those after
it; what PostgreSQL says it will read soon is passed on as a hint; and truncations are reported.
What it cannot get is EIO, never zeros.

`connections.c`: with `HANDOVER_VARIABLE` set to the path of a unix socket on which PostgreSQL
listens, what is accepted there are the connections that an endpoint hands over
(`control_plane.endpoints`); and where there is a lease beside the page socket
(`compute_node.lease`), the messages of clients are held back while it has run out.

`tls.c`: with a certificate, a key and the name of OpenSSL's library, clients that ask for TLS get
it; the wheel's PostgreSQL is built without.

Without its variables it does nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from boreal.errors import BadUsage, ProcessFailed

SOCKET_VARIABLE = "BOREAL_PAGE_SOCKET"
"""The environment variable by which PostgreSQL's shim finds its agent."""
PARENT_VARIABLE = "BOREAL_PARENT_PID"
"""If set, the process that starts PostgreSQL; when it dies, the kernel sends PostgreSQL SIGQUIT."""
LIMITED_VARIABLE = "BOREAL_CACHE_LIMITED"
"""If set, the agent evicts pages from files in use (`compute_node.cache`): mind its locks."""
HANDOVER_VARIABLE = "BOREAL_HANDOVER"
"""The unix socket of PostgreSQL's own on which endpoints hand over connections."""
TLS_LIBRARY_VARIABLE = "BOREAL_TLS_LIBRARY"
TLS_CERTIFICATE_VARIABLE = "BOREAL_TLS_CERTIFICATE"
TLS_KEY_VARIABLE = "BOREAL_TLS_KEY"
"""With these clients may have TLS: OpenSSL's libssl, and two files in PEM."""
MAX_SOCKET_PATH_BYTES = 107
"""sun_path (unix(7)) without its final zero."""

_FOLDER = Path(__file__).parent
_SOURCES = (_FOLDER / "boreal_shim.c", _FOLDER / "connections.c", _FOLDER / "tls.c")
_HEADER = _FOLDER / "shim.h"
_FLAGS = (
    *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"),
    *("-shared", "-fPIC", "-fvisibility=hidden"),
    # Some distributions turn this on by default; it makes `read` and `open` inline functions.
    *("-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=0"),
)
_COMPILE_WITHIN_S = 120.0
_OPENSSL = ("libssl.so.3", "libssl.so.1.1")
"""The newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """What PostgreSQL's clients are shown. Files that PostgreSQL's account can read."""

    certificate: Path
    key: Path

    def environment(self) -> dict[str, str]:
        """The shim's variables; BadUsage where there is no OpenSSL."""
        return {
            TLS_LIBRARY_VARIABLE: openssl(),
            TLS_CERTIFICATE_VARIABLE: str(self.certificate),
            TLS_KEY_VARIABLE: str(self.key),
        }


def environment(
    library: Path,
    socket_path: Path,
    *,
    cache_limited: bool = False,
    handover: Path | None = None,
    tls: ClientTls | None = None,
) -> dict[str, str]:
    """What to add to PostgreSQL's environment so that it runs with the shim.

    `cache_limited` must be true where pages are evicted from its files. `handover` is the unix
    socket where endpoints hand over connections: PostgreSQL must listen there, by its
    unix_socket_directories, and the file of the lease must be there when it starts. To be started
    from the caller's main thread: it is told to quit when the thread that started it ends
    (PR_SET_PDEATHSIG, prctl(2)).
    """
    return {
        "LD_PRELOAD": str(library),
        SOCKET_VARIABLE: str(socket_path),
        PARENT_VARIABLE: str(os.getpid()),
        **({LIMITED_VARIABLE: "1"} if cache_limited else {}),
        **({HANDOVER_VARIABLE: str(handover)} if handover else {}),
        **(tls.environment() if tls else {}),
    }


@cache
def openssl() -> str:
    """The name of the system's libssl; BadUsage where there is none."""
    for name in _OPENSSL:
        with suppress(OSError):  # not this one
            ctypes.CDLL(name)
            return name
    raise BadUsage(
        f"TLS for clients needs OpenSSL, and neither {' nor '.join(_OPENSSL)} can be loaded. "
        "Install it (`apt-get install libssl3`), or run with --insecure"
    )


def build(into: Path) -> Path:
    """Compile the shim into the directory `into` unless these sources were; return the library.

    The file is readable by all (PostgreSQL runs under another account) and appears whole or not at
    all. Raises BadUsage where there is no C compiler, ProcessFailed if it fails.
    """
    content = b"".join(path.read_bytes() for path in (*_SOURCES, _HEADER))
    digest = hashlib.sha256(content + " ".join(_FLAGS).encode()).hexdigest()
    library = into / f"boreal_shim-{digest[:16]}.so"
    if library.exists():
        return library
    into.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=into, prefix=".boreal_shim-", suffix=".so")
    os.close(descriptor)
    fresh = Path(name)
    try:
        _compile(fresh)
        fresh.chmod(0o755)
        fresh.replace(library)
    finally:
        fresh.unlink(missing_ok=True)
    return library


def compiler() -> list[str]:
    """The command of a C compiler: the system's, or that of the `ziglang` wheel."""
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise BadUsage(
        "the page shim needs a C compiler and none was found. Install one (`apt-get install gcc`), "
        f"or run `{sys.executable} -m pip install ziglang`"
    )


def _compile(output: Path) -> None:
    command = [*compiler(), *_FLAGS, "-o", str(output), *map(str, _SOURCES), "-ldl"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_COMPILE_WITHIN_S
        )
    except subprocess.TimeoutExpired as error:
        raise ProcessFailed(
            f"compiling the page shim took over {_COMPILE_WITHIN_S:g} s: {' '.join(command)}"
        ) from error
    if done.returncode != 0:
        raise ProcessFailed(f"compiling the page shim failed: {' '.join(command)}\n{done.stderr}")
