"""Instances that take connections from an endpoint: stock PostgreSQL with that part of the shim."""

from __future__ import annotations

import atexit
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from boreal.cluster import HOST, free_ports
from boreal.engine import Engine, find_engine
from boreal.rpc import control_pb2
from boreal.rpc.identity import CERTIFICATE_FILE, KEY_FILE
from compute_node import shim
from tests.support.stock_postgres import StockPostgres


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOver:
    """One instance: PostgreSQL with a volume of its own, whose `cluster_name` is `name`."""

    name: str
    server: StockPostgres
    port: int
    handover: Path

    def route(self, *, writer: bool = False) -> control_pb2.Route:
        """As the control plane tells of it."""
        return control_pb2.Route(
            instance=self.name,
            writer=writer,
            host=HOST,
            postgres_port=self.port,
            handover=str(self.handover),
        )

    def carrier(self) -> socket.socket:
        """A connection to the socket where connections are handed over."""
        carrier = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        carrier.settimeout(10)
        carrier.connect(str(self.handover))
        return carrier


@cache
def _library() -> Path:
    """The shim, where PostgreSQL's account reaches it. Compiled once in a run of tests."""
    directory = Path(tempfile.mkdtemp(prefix="boreal-shim-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    directory.chmod(0o755)
    return shim.build(directory)


def _client_tls(engine: Engine, home: Path, tls_dir: Path) -> shim.ClientTls:
    """As the agent hands it to PostgreSQL."""
    tls = shim.ClientTls(certificate=home / CERTIFICATE_FILE, key=home / KEY_FILE)
    for path in (tls.certificate, tls.key):
        shutil.copy(tls_dir / path.name, path)
        engine.account.own(path)
    return tls


@contextmanager
def handed_over(
    name: str, settings: Mapping[str, str] | None = None, tls_dir: Path | None = None
) -> Iterator[HandedOver]:
    """Run one; stop and remove it after. Clients may have TLS if there is a `tls_dir`."""
    home = Path(tempfile.mkdtemp(prefix="boreal-ho-"))
    try:
        home.chmod(0o755)
        engine = find_engine(home / "engine")
        folder = home / "handover"
        folder.mkdir()
        for path in (home, folder):
            engine.account.own(path)
        (port,) = free_ports(1)
        handover = folder / f".s.PGSQL.{port}"
        server = StockPostgres(
            engine,
            home,
            {
                "listen_addresses": HOST,
                "port": str(port),
                "unix_socket_directories": f"{home}, {folder}",
                "cluster_name": name,
                **(settings or {}),
            },
            {
                "LD_PRELOAD": str(_library()),
                shim.HANDOVER_VARIABLE: str(handover),
                **(_client_tls(engine, home, tls_dir).environment() if tls_dir else {}),
            },
        )
        try:
            server.create()
            server.start()
            yield HandedOver(name=name, server=server, port=port, handover=handover)
        finally:
            server.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)
