"""The two SQL functions Aurora's drivers call, and the file the agent answers one of them with.

`aurora_db_instance_identifier()` is the instance's name. `aurora_replica_status()` has a row for
each instance of the cluster; drivers find the writer by its session_id. Columns and meanings as the
Aurora user guide tells them ("aurora_replica_status"); one we have no figure for is null.

SQL cannot ask the agent, so the agent writes what it knows into a file in PGDATA, several times a
second, and the function reads that one file with its owner's rights. Both functions live in
pg_catalog: there drivers look for them, no schema can come before it, and the owner of a database
can neither drop nor replace what is in it. They are made in template1 and template0 too, for
databases to come.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from boreal.engine import Engine
from boreal.rpc import compute_pb2, control_pb2
from compute_node.pgdata import AGENT_DIRECTORY

FILE = f"{AGENT_DIRECTORY}/replica_status.json"
"""Relative to PGDATA, which is PostgreSQL's working directory."""

_WRITER_SESSION = "MASTER_SESSION_ID"
_COLUMNS = {
    "server_id": "text",
    "session_id": "text",
    "durable_lsn": "bigint",
    "highest_lsn_rcvd": "bigint",
    "current_read_lsn": "bigint",
    "cur_replay_latency_in_usec": "bigint",
    "active_txns": "bigint",
    "is_current": "boolean",
    "last_transport_error": "integer",
    "last_error_timestamp": "timestamp with time zone",
    "last_update_timestamp": "timestamp with time zone",
    "feedback_xmin": "bigint",
    "feedback_epoch": "bigint",
    "replica_lag_in_msec": "double precision",
    "log_stream_speed_in_kib_per_second": "double precision",
    "log_buffer_sequence_number": "bigint",
    "oldest_read_view_trx_id": "bigint",
    "oldest_read_view_lsn": "bigint",
    "pending_read_ios": "bigint",
    "read_ios": "bigint",
    "iops": "integer",
    "cpu": "real",
}
_RECORD = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
_IDENTIFIER = """
    create function pg_catalog.aurora_db_instance_identifier() returns text
    language sql stable parallel safe
    return pg_catalog.current_setting('cluster_name');
"""
_READ = f"pg_catalog.pg_read_file('{FILE}', true)"  # null if there is no such file
_STATUS = f"""
    create function pg_catalog.aurora_replica_status() returns table ({_RECORD})
    language sql volatile parallel restricted security definer rows 16
    set search_path = pg_catalog, pg_temp
    begin atomic
        select * from pg_catalog.json_to_recordset({_READ}::pg_catalog.json) as status ({_RECORD});
    end;
"""  # noqa: S608 - every part of it is ours

Row = dict[str, str | int | float | bool | None]


def create_functions_sql() -> str:
    """The statements that make both functions, one a line, for a superuser.

    A body that begins with `return` or `begin atomic` is parsed now and never again: no search_path
    of a caller changes what it means.
    """
    return "".join(f"{' '.join(each.split())}\n" for each in (_IDENTIFIER, _STATUS))


class ReplicaStatusFile:
    """The file behind `aurora_replica_status()` in one PGDATA.

    Replaced in one piece, so PostgreSQL reads the old rows or the new; not synced, since it ends
    with its PGDATA. While there is none, the function gives no rows.
    """

    def __init__(self, pgdata: Path, engine: Engine) -> None:
        self._path = pgdata / FILE
        self._draft = self._path.with_suffix(".part")
        self._engine = engine

    def write(
        self,
        instances: Sequence[control_pb2.InstanceStatus],
        own: compute_pb2.ComputeStatus,
        *,
        age_s: float = 0.0,
    ) -> None:
        """Tell PostgreSQL of `instances`, as the control plane did `age_s` ago, and of this one.

        OSError if the directory is gone: PGDATA is being rebuilt.
        """
        content = json.dumps(replica_status(instances, own, datetime.now(UTC), age_s=age_s))
        if not self._path.parent.is_dir():
            self._path.parent.mkdir(mode=0o700)
            self._engine.account.own(self._path.parent)
        self._draft.write_text(content)
        self._draft.chmod(0o600)
        self._engine.account.own(self._draft)
        self._draft.rename(self._path)


# --- the rows: pure ------------------------------------------------------------------------------


def replica_status(
    instances: Sequence[control_pb2.InstanceStatus],
    own: compute_pb2.ComputeStatus,
    now: datetime,
    *,
    age_s: float = 0.0,
) -> list[Row]:
    """A row for each instance, by name. `own` is newer than what the others know of this one.

    last_update_timestamp is when an instance last reported. (Aurora gives null for the instance
    asked; older drivers then take it for gone.)
    """
    told = {each.status.instance: each for each in instances}
    statuses = {name: each.status for name, each in told.items()} | {own.instance: own}
    silent_s = {name: each.silent_ms / 1000 + age_s for name, each in told.items()}
    silent_s[own.instance] = 0.0
    present = {name for name, each in told.items() if each.alive} | {own.instance}
    writer = _writer([statuses[name] for name in sorted(present)])
    followers = {each.instance: each for each in writer.followers} if writer else {}
    return [
        {
            **dict.fromkeys(_COLUMNS),
            "server_id": name,
            "is_current": name in present,
            "last_transport_error": 0,
            "last_update_timestamp": (now - timedelta(seconds=silent_s[name])).isoformat(),
            **(
                _of_writer(status)
                if writer is not None and name == writer.instance
                else _of_reader(status, followers)
            ),
        }
        for name, status in sorted(statuses.items())
    ]


def _writer(present: Sequence[compute_pb2.ComputeStatus]) -> compute_pb2.ComputeStatus | None:
    """Of those that say they write, the one of the highest epoch: another was deposed."""
    writers = [each for each in present if each.state == compute_pb2.WRITER]
    return max(writers, key=lambda each: each.volume.epoch, default=None)


def _of_writer(status: compute_pb2.ComputeStatus) -> Row:
    return {"session_id": _WRITER_SESSION, "durable_lsn": status.vdl}


def _of_reader(
    status: compute_pb2.ComputeStatus, followers: Mapping[str, compute_pb2.FollowerStatus]
) -> Row:
    row: Row = {
        "session_id": _session(status.incarnation),
        "durable_lsn": status.replay_lsn,
        "highest_lsn_rcvd": status.received_lsn,
        "current_read_lsn": status.replay_lsn,
        "cur_replay_latency_in_usec": status.replay_lag_us,
        "replica_lag_in_msec": status.replay_lag_us / 1000,
    }
    follower = followers.get(status.instance)
    if follower is not None:
        row["oldest_read_view_lsn"] = follower.floor_lsn
        if follower.oldest_xmin:
            row["feedback_epoch"], row["feedback_xmin"] = divmod(follower.oldest_xmin, 2**32)
    return row


def _session(incarnation: str) -> str:
    """In the form drivers know: a reader's session_id is a UUID."""
    try:
        return str(UUID(hex=incarnation))
    except ValueError:
        return incarnation
