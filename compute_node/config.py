"""What a compute node is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from boreal.rpc.identity import CERTIFICATE_FILE, KEY_FILE
from boreal.types import InstanceName
from compute_node.shim import ClientTls

SLOT = "boreal"
"""The replication slot through which the writer's WAL leaves PostgreSQL."""
SHIPPER_NAME = "boreal"
"""`application_name` of the agent: the only synchronous standby."""
ADMIN = "boreal_admin"
"""The internal superuser: only over the unix socket, only for the agent's own OS account."""
MASTER = "boreal"
"""The user's master role. Not a superuser."""
DATABASE = "postgres"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeConfig:
    """One compute node's settings."""

    name: InstanceName
    data_dir: Path
    engine_dir: Path
    """The page shim, and a copy of PostgreSQL where its account cannot reach the original."""
    host: str
    """To listen on, for the agent and for PostgreSQL."""
    control: str
    port: int
    """Of the agent's own gRPC service."""
    postgres_port: int
    master_password: str
    tier: int = 1
    """Failover priority: 0 is appointed first, 15 last."""
    cache_bytes: int = 0
    """Soft bound on the relation files in PGDATA (`compute_node.cache`); 0: none."""
    settings: tuple[tuple[str, str], ...] = ()
    """Further postgresql.conf settings."""
    metrics_port: int | None = None
    """HTTP: the agent's metrics; None: they are not served."""
    tls_dir: Path | None = None
    """Who this node is (boreal.rpc.identity), to clients too; None: unencrypted."""
    advertise: str | None = None
    """The host by which others reach this node; None: that it listens on."""
    takes_handovers: bool = True
    """Whether endpoints that share a directory with it hand connections over."""
    shared_handover_dir: Path | None = None
    """That directory, a part of it for each instance; None: it is the run directory."""

    @property
    def address(self) -> str:
        """HOST:PORT by which others reach the agent. PostgreSQL is at the same host."""
        return f"{self.advertise or self.host}:{self.port}"

    @property
    def pgdata(self) -> Path:
        """PostgreSQL's data directory: a cache, rebuilt from storage at every start."""
        return self.data_dir / "pgdata"

    @property
    def run_dir(self) -> Path:
        """Unix sockets: PostgreSQL's, the page service's and the feed's."""
        return self.data_dir / "run"

    @property
    def client_tls(self) -> ClientTls | None:
        """What PostgreSQL shows its clients; copies, since its account must get at them."""
        if self.tls_dir is None:
            return None
        return ClientTls(certificate=self.run_dir / CERTIFICATE_FILE, key=self.run_dir / KEY_FILE)

    @property
    def page_socket(self) -> Path:
        """Where the shim asks for pages."""
        return self.run_dir / "pages"

    @property
    def feed_dir(self) -> Path:
        """The directory in which the feed listens, as libpq wants it."""
        return self.run_dir / "feed"

    @property
    def handover_dir(self) -> Path | None:
        """The directory of the socket by which PostgreSQL takes connections accepted elsewhere."""
        if not self.takes_handovers:
            return None
        if self.shared_handover_dir is None:
            return self.run_dir / "handover"
        return self.shared_handover_dir / self.name

    @property
    def handover_socket(self) -> Path | None:
        """That socket, named as PostgreSQL does; None: connections come by TCP only."""
        folder = self.handover_dir
        return folder / f".s.PGSQL.{self.postgres_port}" if folder else None
