"""A local cluster: where it lives, its ports and names, and its password (`cluster.json`)."""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from boreal.errors import BadUsage
from boreal.files import write_atomic
from boreal.types import InstanceName, NodeName

HOST = "127.0.0.1"
POSTGRES_PORT = 54320
MASTER_USER = "boreal"
DATABASE = "postgres"
CONTROL = "control"
"""The control plane's name as a process."""

ZONES = {"sn-1": "a", "sn-2": "a", "sn-3": "b", "sn-4": "b", "sn-5": "c", "sn-6": "c"}
COMPUTE = InstanceName("db-1")

_LOWEST_PORT = 10_000
_EPHEMERAL_DEFAULT = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageEntry:
    """One storage node: its name, its zone and its three ports."""

    name: NodeName
    zone: str
    log_port: int
    frames_port: int
    pages_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """One local cluster. Everything in it listens on the loopback interface only."""

    data_dir: Path
    postgres_port: int
    control_port: int
    agent_port: int
    storage: tuple[StorageEntry, ...]
    master_password: str
    retain_log_mib: int | None = None
    """How much log below the floor each storage node keeps; None: what storage nodes think best."""
    cache_bytes: int = 0
    """Bound on the pages a compute node keeps locally; 0: none."""

    @property
    def control_address(self) -> str:
        """The control plane's gRPC address."""
        return f"{HOST}:{self.control_port}"

    @property
    def agent_address(self) -> str:
        """The compute agent's gRPC address."""
        return f"{HOST}:{self.agent_port}"

    @property
    def password_file(self) -> Path:
        """The master password by itself, for the compute node."""
        return self.data_dir / "master-password"

    @property
    def dsn(self) -> str:
        """The connection string of the master user at the writer."""
        return (
            f"postgresql://{MASTER_USER}:{self.master_password}@{HOST}:{self.postgres_port}"
            f"/{DATABASE}"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every process of the cluster, in the order people think of them."""
        return (CONTROL, *(entry.name for entry in self.storage), COMPUTE)

    def save(self) -> None:
        """Write cluster.json and the password file, atomically, for the owner's eyes only."""
        content = asdict(self)
        del content["data_dir"]  # it is where the file is
        write_atomic(self.data_dir / "cluster.json", json.dumps(content, indent=2) + "\n")
        write_atomic(self.password_file, self.master_password + "\n")


def load(data_dir: Path) -> ClusterConfig:
    """Read the cluster of `data_dir`; BadUsage if there is none."""
    path = data_dir / "cluster.json"
    try:
        raw = json.loads(path.read_text())
        storage = tuple(StorageEntry(**entry) for entry in raw.pop("storage"))
        unknown = raw.keys() - {field.name for field in fields(ClusterConfig)}
        if unknown:
            raise BadUsage(
                f"{path} was written by another version of Boreal: this one does not know "
                f"{', '.join(sorted(unknown))}. Use that version, or another --data-dir"
            )
        return ClusterConfig(data_dir=data_dir, storage=storage, **raw)
    except FileNotFoundError:
        raise BadUsage(
            f"there is no cluster in {data_dir}; start one with `boreal up`, or name another "
            "directory with --data-dir"
        ) from None
    except PermissionError:
        raise BadUsage(
            f"{path} belongs to another user; run boreal as the one who made it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadUsage(f"{path} is not a cluster file: {error}") from error


def create(data_dir: Path, *, postgres_port: int) -> ClusterConfig:
    """Settle names, ports and a password for a new cluster. Writes nothing."""
    ports = free_ports(2 + 3 * len(ZONES))
    control_port, agent_port = ports[:2]
    storage = tuple(
        StorageEntry(
            name=NodeName(name),
            zone=zone,
            log_port=log_port,
            frames_port=frames_port,
            pages_port=pages_port,
        )
        for (name, zone), log_port, frames_port, pages_port in zip(
            ZONES.items(), ports[2::3], ports[3::3], ports[4::3], strict=True
        )
    )
    return ClusterConfig(
        data_dir=data_dir,
        postgres_port=postgres_port,
        control_port=control_port,
        agent_port=agent_port,
        storage=storage,
        master_password=secrets.token_urlsafe(18),
    )


# --- ports ---------------------------------------------------------------------------------------


def internal_ports(config: ClusterConfig) -> tuple[int, ...]:
    """Every port but PostgreSQL's: those nobody but Boreal needs to know."""
    return (
        config.control_port,
        config.agent_port,
        *(
            port
            for entry in config.storage
            for port in (entry.log_port, entry.frames_port, entry.pages_port)
        ),
    )


def with_free_ports(config: ClusterConfig) -> tuple[ClusterConfig, dict[int, int]]:
    """Replace the internal ports that somebody else took; also return old → new.

    Only for a cluster of which nothing runs: a port of our own counts as taken too.
    """
    taken = [port for port in internal_ports(config) if not is_free(port)]
    fresh = free_ports(len(taken), avoid=internal_ports(config))
    moved = dict(zip(taken, fresh, strict=True))

    def now(port: int) -> int:
        return moved.get(port, port)

    storage = tuple(
        replace(
            entry,
            log_port=now(entry.log_port),
            frames_port=now(entry.frames_port),
            pages_port=now(entry.pages_port),
        )
        for entry in config.storage
    )
    return replace(
        config,
        control_port=now(config.control_port),
        agent_port=now(config.agent_port),
        storage=storage,
    ), moved


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections that linger in TIME_WAIT are not in the way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_ports(
    count: int,
    *,
    avoid: Iterable[int] = (),
    free: Callable[[int], bool] = is_free,
) -> list[int]:
    """Find ports below the ephemeral range, where the kernel gives none to outgoing connections.

    The search begins anywhere, so that two clusters that start at once rarely meet.
    """
    highest = max(_ephemeral_start(), _LOWEST_PORT + 1000)
    candidates = list(range(_LOWEST_PORT, highest))
    start = random.SystemRandom().randrange(len(candidates))
    avoided = set(avoid)
    found: list[int] = []
    for port in candidates[start:] + candidates[:start]:
        if len(found) == count:
            break
        if port not in avoided and free(port):
            found.append(port)
    if len(found) < count:
        raise BadUsage(f"no {count} free ports between {_LOWEST_PORT} and {highest}")
    return found


def _ephemeral_start() -> int:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    except FileNotFoundError:
        return _EPHEMERAL_DEFAULT
    return int(text.split()[0])


# --- the directory -------------------------------------------------------------------------------


def default_data_dir() -> Path:
    """The one fixed place: /var/lib/boreal for root, the XDG data directory for others."""
    if os.geteuid() == 0:
        return Path("/var/lib/boreal")
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "boreal"


def prepare_directory(data_dir: Path) -> None:
    """Make the directory. BadUsage if PostgreSQL, which will not run as root, cannot get there."""
    try:
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        if not data_dir.is_dir():
            data_dir.mkdir()
            data_dir.chmod(0o755)  # whatever the umask; what is secret inside is closed by itself
    except OSError as error:
        raise BadUsage(
            f"cannot make {data_dir}: {error.strerror}; choose another --data-dir"
        ) from error
    if os.geteuid() == 0:
        _check_reachable(data_dir)


def _check_reachable(data_dir: Path) -> None:
    for directory in (data_dir, *data_dir.parents):
        if not directory.stat().st_mode & 0o001:
            raise BadUsage(
                f"{directory} is closed to other users, and PostgreSQL does not run as root: it "
                f"will run as an unprivileged account that must get through to {data_dir}. Choose "
                f"another --data-dir (such as /var/lib/boreal), or run: chmod o+x {directory}"
            )
