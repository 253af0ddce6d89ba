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
from typing import Any, TypeVar

from boreal.errors import BadUsage
from boreal.files import write_atomic
from boreal.types import InstanceName, NodeName

HOST = "127.0.0.1"
ENVIRONMENT_PREFIX = "BOREAL"
"""Every option of every process can be given in the environment: --tls-dir as BOREAL_TLS_DIR."""
POSTGRES_PORT = 54320
"""The writer endpoint's; the reader endpoint's is the next one."""
MASTER_USER = "boreal"
DATABASE = "postgres"
CONTROL = "control"
"""The control plane's name as a process."""
COMMAND = "boreal"
"""The name under which the `boreal` command calls the processes."""
ENDPOINTS = "endpoints"
"""The name of the process that listens where clients connect."""

ZONES = {"sn-1": "a", "sn-2": "a", "sn-3": "b", "sn-4": "b", "sn-5": "c", "sn-6": "c"}
MAX_INSTANCES = 16
"""A writer and fifteen readers: as many as Aurora has."""
DEFAULT_TIER = 1
LAST_TIER = 15

_Entry = TypeVar("_Entry", "StorageEntry", "InstanceEntry")

_LOWEST_PORT = 10_000
_HIGHEST_PORT = 65_535
_EPHEMERAL_DEFAULT = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageEntry:
    """One storage node: its name, its zone and its ports."""

    name: NodeName
    zone: str
    log_port: int
    frames_port: int
    pages_port: int
    page_frames_port: int
    metrics_port: int
    pages_metrics_port: int

    @property
    def ports(self) -> tuple[int, ...]:
        """All it listens on."""
        return _ports_of(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceEntry:
    """One instance: a PostgreSQL and its agent. Which one is the writer is not settled here."""

    name: InstanceName
    tier: int
    """Who takes over first when the writer fails: 0 before 1, up to 15."""
    agent_port: int
    postgres_port: int
    """Where this very instance serves SQL, whatever its role."""
    metrics_port: int

    @property
    def ports(self) -> tuple[int, ...]:
        """All it listens on."""
        return _ports_of(self)

    @property
    def agent_address(self) -> str:
        """Its agent's gRPC address."""
        return f"{HOST}:{self.agent_port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """One local cluster. Everything in it listens on the loopback interface only.

    Invariant: one to sixteen instances; names and ports occur once.
    """

    data_dir: Path
    postgres_port: int
    """The writer endpoint's."""
    reader_port: int
    """The reader endpoint's."""
    control_port: int
    control_metrics_port: int
    endpoints_metrics_port: int
    storage: tuple[StorageEntry, ...]
    compute: tuple[InstanceEntry, ...]
    master_password: str
    retain_log_mib: int | None = None
    """How much log below the floor each storage node keeps; None: what storage nodes think best."""
    cache_bytes: int = 0
    """Bound on the pages a compute node keeps locally; 0: none."""
    insecure: bool = False
    """Whether its processes talk unencrypted, to anybody who comes."""

    @property
    def tls_dir(self) -> Path:
        """The authority's certificate, and a directory for each process's own."""
        return self.data_dir / "tls"

    @property
    def command_tls_dir(self) -> Path:
        """The `boreal` command's own."""
        return self.tls_dir / COMMAND

    @property
    def control_address(self) -> str:
        """The control plane's gRPC address."""
        return f"{HOST}:{self.control_port}"

    @property
    def agent_addresses(self) -> dict[str, str]:
        """The agents' gRPC addresses, by instance."""
        return {entry.name: entry.agent_address for entry in self.compute}

    @property
    def engine_dir(self) -> Path:
        """What all compute nodes run: the page shim, PostgreSQL if it had to be copied."""
        return self.data_dir / "engine"

    @property
    def password_file(self) -> Path:
        """The master password by itself, for the compute node."""
        return self.data_dir / "master-password"

    @property
    def dsn(self) -> str:
        """The connection string of the master user at the writer endpoint."""
        return self._dsn_at(self.postgres_port)

    @property
    def reader_dsn(self) -> str:
        """The same at the reader endpoint."""
        return self._dsn_at(self.reader_port)

    def instance_dsn(self, name: str) -> str:
        """The same at one instance, whatever its role; BadUsage if there is none of that name."""
        return self._dsn_at(self.instance(name).postgres_port)

    def _dsn_at(self, port: int) -> str:
        return f"postgresql://{MASTER_USER}:{self.master_password}@{HOST}:{port}/{DATABASE}"

    def instance(self, name: str) -> InstanceEntry:
        """The instance of that name; BadUsage, with the names there are, if there is none."""
        for entry in self.compute:
            if entry.name == name:
                return entry
        names = ", ".join(self.instance_names)
        raise BadUsage(f"there is no instance {name} here; the instances are {names}")

    @property
    def instance_names(self) -> tuple[InstanceName, ...]:
        """Every instance."""
        return tuple(entry.name for entry in self.compute)

    @property
    def names(self) -> tuple[str, ...]:
        """Every process of the cluster, in the order people think of them."""
        storage = (entry.name for entry in self.storage)
        return (CONTROL, ENDPOINTS, *storage, *self.instance_names)

    @property
    def metrics_ports(self) -> dict[str, int]:
        """Where each process serves its metrics; the page process of sn-1 is named sn-1/pages."""
        return {
            CONTROL: self.control_metrics_port,
            ENDPOINTS: self.endpoints_metrics_port,
            **{node.name: node.metrics_port for node in self.storage},
            **{f"{node.name}/pages": node.pages_metrics_port for node in self.storage},
            **{entry.name: entry.metrics_port for entry in self.compute},
        }

    def save(self) -> None:
        """Write cluster.json and the password file, atomically, for the owner's eyes only."""
        content = asdict(self)
        del content["data_dir"]  # it is where the file is
        write_atomic(self.data_dir / "cluster.json", json.dumps(content, indent=2) + "\n")
        write_atomic(self.password_file, self.master_password + "\n")
        # No secret, and Prometheus is another user.
        targets = json.dumps(prometheus_targets(self), indent=2) + "\n"
        write_atomic(self.data_dir / "prometheus-targets.json", targets, mode=0o644)


def load(data_dir: Path) -> ClusterConfig:
    """Read the cluster of `data_dir`; BadUsage if there is none."""
    path = data_dir / "cluster.json"
    try:
        raw = json.loads(path.read_text())
        unknown = raw.keys() - {field.name for field in fields(ClusterConfig)}
        if unknown:
            raise BadUsage(
                f"{path} was written by another version of Boreal: this one does not know "
                f"{', '.join(sorted(unknown))}. Use that version, or another --data-dir"
            )
        storage = tuple(StorageEntry(**entry) for entry in raw.pop("storage"))
        compute = tuple(InstanceEntry(**entry) for entry in raw.pop("compute"))
        return ClusterConfig(data_dir=data_dir, storage=storage, compute=compute, **raw)
    except FileNotFoundError:
        raise BadUsage(
            f"there is no cluster in {data_dir}; start one with `boreal up`, or name another "
            "directory with --data-dir"
        ) from None
    except PermissionError:
        raise BadUsage(
            f"{path} belongs to another user; run boreal as the one who made it"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadUsage(f"{path} is not a cluster file: {error}") from error


def create(data_dir: Path, *, postgres_port: int, reader_port: int | None = None) -> ClusterConfig:
    """Settle names, ports and a password for a new cluster of one instance. Writes nothing.

    Without a `reader_port` it is the one after `postgres_port`, or any where that one is taken.
    """
    reader_port = reader_port or reader_port_for(postgres_port)
    ports = iter(free_ports(3 + 6 * len(ZONES), avoid=(postgres_port, reader_port)))
    storage = tuple(
        StorageEntry(
            name=NodeName(name),
            zone=zone,
            log_port=next(ports),
            frames_port=next(ports),
            pages_port=next(ports),
            page_frames_port=next(ports),
            metrics_port=next(ports),
            pages_metrics_port=next(ports),
        )
        for name, zone in ZONES.items()
    )
    config = ClusterConfig(
        data_dir=data_dir,
        postgres_port=postgres_port,
        reader_port=reader_port,
        control_port=next(ports),
        control_metrics_port=next(ports),
        endpoints_metrics_port=next(ports),
        storage=storage,
        compute=(),
        master_password=secrets.token_urlsafe(18),
    )
    return with_instance(config)


def reader_port_for(postgres_port: int) -> int:
    """The reader endpoint's port next to that of the writer endpoint; any where it is taken."""
    following = postgres_port + 1
    if following <= _HIGHEST_PORT and is_free(following):
        return following
    return free_ports(1, avoid=[postgres_port])[0]


# --- instances -----------------------------------------------------------------------------------


def with_instance(config: ClusterConfig, tier: int = DEFAULT_TIER) -> ClusterConfig:
    """Add an instance: the first free name, free ports. BadUsage if there are sixteen."""
    names = [InstanceName(f"db-{number}") for number in range(1, MAX_INSTANCES + 1)]
    free = [name for name in names if name not in config.instance_names]
    if not free:
        raise BadUsage(
            f"a cluster has at most {MAX_INSTANCES} instances, a writer and "
            f"{MAX_INSTANCES - 1} readers; `boreal remove-reader` makes room"
        )
    agent_port, postgres_port, metrics_port = free_ports(3, avoid=_all_ports(config))
    entry = InstanceEntry(
        name=free[0],
        tier=tier,
        agent_port=agent_port,
        postgres_port=postgres_port,
        metrics_port=metrics_port,
    )
    compute = sorted((*config.compute, entry), key=lambda each: names.index(each.name))
    return replace(config, compute=tuple(compute))


def with_readers(config: ClusterConfig, readers: int) -> ClusterConfig:
    """Add instances until there is one more than `readers`; takes none away."""
    while len(config.compute) < readers + 1:
        config = with_instance(config)
    return config


def without_instance(config: ClusterConfig, name: str) -> ClusterConfig:
    """Take an instance out."""
    compute = tuple(entry for entry in config.compute if entry.name != name)
    return replace(config, compute=compute)


# --- ports ---------------------------------------------------------------------------------------


def _ports_of(entry: StorageEntry | InstanceEntry) -> tuple[int, ...]:
    return tuple(getattr(entry, name) for name in _port_names(entry))


def _port_names(entry: StorageEntry | InstanceEntry) -> list[str]:
    return [field.name for field in fields(entry) if field.name.endswith("_port")]


def internal_ports(config: ClusterConfig) -> tuple[int, ...]:
    """Every port but the endpoints': those a user need not know."""
    return (
        config.control_port,
        config.control_metrics_port,
        config.endpoints_metrics_port,
        *(port for node in config.storage for port in node.ports),
        *(port for instance in config.compute for port in instance.ports),
    )


def _all_ports(config: ClusterConfig) -> tuple[int, ...]:
    return (config.postgres_port, config.reader_port, *internal_ports(config))


def with_free_ports(config: ClusterConfig) -> tuple[ClusterConfig, dict[int, int]]:
    """Replace the internal ports that somebody else took; also return old → new.

    Only for a cluster of which nothing runs: a port of our own counts as taken too.
    """
    taken = [port for port in internal_ports(config) if not is_free(port)]
    fresh = free_ports(len(taken), avoid=_all_ports(config))
    moved = dict(zip(taken, fresh, strict=True))

    def now(port: int) -> int:
        return moved.get(port, port)

    def settled(entry: _Entry) -> _Entry:
        ports: Any = {name: now(getattr(entry, name)) for name in _port_names(entry)}
        return replace(entry, **ports)

    config = replace(
        config,
        control_port=now(config.control_port),
        control_metrics_port=now(config.control_metrics_port),
        endpoints_metrics_port=now(config.endpoints_metrics_port),
        storage=tuple(map(settled, config.storage)),
        compute=tuple(map(settled, config.compute)),
    )
    return config, moved


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


# --- metrics -------------------------------------------------------------------------------------


def prometheus_targets(config: ClusterConfig) -> list[dict[str, Any]]:
    """Where every process serves its metrics, as Prometheus reads it (file_sd_config).

    `instance` is the process's name: a better one than its address, which may change. The page
    process of a storage node is a component of its own, under the node's name.
    """

    def target(port: int, instance: str, component: str, **labels: str) -> dict[str, Any]:
        known = {"instance": instance, "component": component, **labels}
        return {"targets": [f"{HOST}:{port}"], "labels": known}

    groups = [
        target(config.control_metrics_port, CONTROL, "control"),
        target(config.endpoints_metrics_port, ENDPOINTS, "endpoints"),
    ]
    for node in config.storage:
        groups += [
            target(node.metrics_port, node.name, "storage", zone=node.zone),
            target(node.pages_metrics_port, node.name, "pages", zone=node.zone),
        ]
    groups += [target(entry.metrics_port, entry.name, "compute") for entry in config.compute]
    return groups


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
