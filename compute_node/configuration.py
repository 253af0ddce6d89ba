"""PostgreSQL's configuration, and the directories it lives in."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from boreal.engine import Engine
from boreal.rpc.identity import CERTIFICATE_FILE, KEY_FILE
from compute_node.config import ADMIN, SHIPPER_NAME, ComputeConfig

AFTER_IMAGES = "gin,spgist"
"""Resource managers whose records carry an image of each page after the change, which storage takes
for the page. For all others it has PostgreSQL's redo (storage_node/redo)."""


def _socket_dirs(config: ComputeConfig) -> tuple[Path, ...]:
    return tuple(path for path in (config.run_dir, config.handover_dir) if path)


def _settings(config: ComputeConfig) -> dict[str, str]:
    return {
        "listen_addresses": config.host,
        "port": str(config.postgres_port),
        # By the second one the endpoints hand over connections they accepted (compute_node.shim).
        "unix_socket_directories": ", ".join(str(path) for path in _socket_dirs(config)),
        "unix_socket_permissions": "0700",
        # The log leaves through the agent, the only synchronous standby: PostgreSQL's own queue of
        # commits waiting for it is the asynchronous group commit.
        "wal_level": "replica",
        "max_wal_senders": "10",
        "max_replication_slots": "10",
        "synchronous_standby_names": SHIPPER_NAME,
        "wal_sender_timeout": "0",
        "hot_standby": "on",
        # What a reader's queries still need stays in the volume: the agent tells the writer.
        "hot_standby_feedback": "on",
        "wal_receiver_status_interval": "1s",
        # As Aurora's: a query that holds up replay for longer is cancelled.
        "max_standby_streaming_delay": "14s",
        "primary_conninfo": (
            f"host={config.feed_dir} port={config.postgres_port} user={ADMIN} "
            "application_name=boreal_reader"
        ),
        "wal_receiver_timeout": "0",
        # A client whose machine, or whose relaying endpoints, are gone must not keep its locks.
        "tcp_keepalives_idle": "60",
        "tcp_keepalives_interval": "10",
        "tcp_keepalives_count": "6",
        "wal_retrieve_retry_interval": "100ms",
        "recovery_target_timeline": "latest",
        # Hints of what will be read soon let the page service fetch it in time: those of bitmap
        # scans, and of redo, which looks ahead in the WAL it has received.
        "effective_io_concurrency": "32",
        "maintenance_io_concurrency": "64",
        "recovery_prefetch": "try",
        "wal_decode_buffer_size": "4MB",
        # Local files are a cache: durability and page checksums are the storage nodes' work.
        "fsync": "off",
        "full_page_writes": "off",
        # A backend that was killed may leave half a page in a local file, and nothing here would
        # mend it: after a crash everything is rebuilt from storage.
        "restart_after_crash": "off",
        "wal_log_hints": "off",
        "wal_consistency_checking": AFTER_IMAGES,
        # Bundles take the checkpoints that bound recovery; these would only repeat the work.
        "checkpoint_timeout": "30min",
        "max_wal_size": "4GB",
        # In PGDATA, which is made anew at every start: a PostgreSQL that was killed would leave
        # its segments in /dev/shm for ever.
        "dynamic_shared_memory_type": "mmap",
        "logging_collector": "off",
        "log_line_prefix": "%m [%p] %b ",
        "cluster_name": config.name,
        **dict(config.settings),
    }


def _hba(*, clients: bool) -> str:
    """Who may connect. The agent by its OS account alone; clients only if they may."""
    return "\n".join(
        [
            f"local all {ADMIN} peer map=agent",
            f"local replication {ADMIN} peer map=agent",
            f"host all {ADMIN} all reject",
            "local all all scram-sha-256" if clients else "local all all reject",
            "host all all all scram-sha-256" if clients else "host all all all reject",
            "",
        ]
    )


def write_configuration(config: ComputeConfig, engine: Engine) -> None:
    """Write PGDATA's configuration files, clients kept out."""
    quoted = {name: value.replace("'", "''") for name, value in _settings(config).items()}
    lines = "".join(f"{name} = '{value}'\n" for name, value in quoted.items())
    agent = psutil.Process().username()
    _write(config.pgdata / "postgresql.conf", lines, engine)
    _write(config.pgdata / "postgresql.auto.conf", "", engine)
    write_access(config, engine, clients=False)
    _write(config.pgdata / "pg_ident.conf", f"agent {agent} {ADMIN}\n", engine)


def write_access(config: ComputeConfig, engine: Engine, *, clients: bool) -> None:
    """Write who may connect; PostgreSQL minds it once told to reload its configuration."""
    _write(config.pgdata / "pg_hba.conf", _hba(clients=clients), engine)


def _write(path: Path, text: str, engine: Engine) -> None:
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(text)
    engine.account.own(path)


def prepare_directories(config: ComputeConfig, engine: Engine) -> None:
    """Make the directories PostgreSQL's account must get into, empty but for its certificate."""
    sockets = _socket_dirs(config)
    for path in (config.pgdata, *sockets):
        shutil.rmtree(path, ignore_errors=True)
    for path in (config.pgdata, *sockets, config.feed_dir):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        engine.account.own(path)
    if config.tls_dir is not None:
        for name in (CERTIFICATE_FILE, KEY_FILE):
            _write(config.run_dir / name, (config.tls_dir / name).read_text(), engine)
