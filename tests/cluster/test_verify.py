"""Goal: `boreal verify` finds a wrong page wherever it is, and a damaged file of a stopped node.

Method: a cluster of real processes. One node is stopped and what it was given at the volume's
creation is changed under a right checksum, as no disk would: then its files are damaged.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import lmdb
import pytest

from boreal.types import PAGE_BYTES, parse_lsn
from storage_node.page_store import MAP_BYTES, pack_page, unpack_page
from tests.cluster.local import BOREAL, LocalCluster, until

pytestmark = pytest.mark.timeout(240)
NODE = "sn-2"
TEMPLATE0 = (4).to_bytes(4, "big")
"""Its oid (pg_database.dat), as the keys of imported pages have it."""


def verify(cluster: LocalCluster, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [BOREAL, "verify", f"--data-dir={cluster.directory}", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def volume(cluster: LocalCluster) -> Path:
    (path,) = (cluster.directory / NODE / "volumes").glob(cluster.status()["volume"]["id"])
    return path


def change_an_imported_page(cluster: LocalCluster) -> None:
    """Change a byte of a page, and its checksum."""
    with (
        lmdb.open(
            str(volume(cluster) / "pages" / "imports"), map_size=MAP_BYTES, max_dbs=2
        ) as environment,
        environment.begin(write=True, db=environment.open_db(b"pages")) as transaction,
    ):
        # Of the database that takes no connections: nobody changes it any more.
        key, stored = next(row for row in transaction.cursor() if row[0][4:8] == TEMPLATE0)
        page = bytearray(unpack_page(key, stored, "a page"))
        page[PAGE_BYTES - 100] ^= 1
        transaction.put(key, pack_page(key, bytes(page)))


def test_a_sound_cluster(cluster: LocalCluster) -> None:
    cluster.query(
        "create table t as select i, repeat('x', 200) as x from generate_series(1, 5000) i"
    )
    cluster.query("create index on t (i)")
    cluster.query("create unlogged table u as select 1 as one")
    cluster.query("vacuum t")
    code, text = verify(cluster)
    assert code == 0, text
    assert " 0  pages differ" in text
    assert re.search(r"\d+\.\d  seconds: [\d,]+ pages/s", text)
    assert re.search(r"[1-9]\d*  forks that no catalog names", text)  # template0's


def test_while_it_is_written_to(cluster: LocalCluster) -> None:
    with cluster.pgbench("-i", "-s", "1", "-q") as filling:
        assert filling.wait(120) == 0
    with cluster.pgbench("-c", "2", "-T", "15") as load:
        code, text = verify(cluster)
        load.terminate()
    assert code == 0, text


def test_a_running_node_is_not_checked_offline(cluster: LocalCluster) -> None:
    code, text = verify(cluster, "--offline", NODE)
    assert (code, "runs" in text) == (2, True)


def test_a_page_that_is_wrong_on_one_node(cluster: LocalCluster) -> None:
    cluster.boreal("kill", NODE)
    assert verify(cluster, "--offline", NODE)[0] == 0
    change_an_imported_page(cluster)
    assert verify(cluster, "--offline", NODE)[0] == 0  # a right checksum
    cluster.boreal("restart", NODE)
    until(lambda: caught_up(cluster), 60, "the node that was away to catch up")
    code, text = verify(cluster)
    assert code == 1
    differing = [line for line in text.splitlines() if "differs" in line]
    assert len(differing) == 1, text
    assert differing[0].startswith(f"{NODE}: ")


def test_a_node_that_is_away_is_told(cluster: LocalCluster) -> None:
    cluster.boreal("kill", NODE)
    code, text = verify(cluster)
    cluster.boreal("restart", NODE)
    assert code == 1
    assert f"{NODE}: it was not compared to the end" in text


def test_damaged_files_of_a_stopped_node(cluster: LocalCluster) -> None:
    cluster.boreal("kill", NODE)
    log = max((volume(cluster) / "log").glob("?" * 24))
    at = parse_lsn(cluster.status()["volume"]["vdl"]) % (1 << 24) // 2
    with log.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0xFF]))
    code, text = verify(cluster, "--offline", str(cluster.directory / NODE))
    with log.open("r+b") as file:
        file.seek(at)
        file.write(byte)
    assert code == 1
    assert "does not match its checksum" in text
    assert "stopped peer" in text
    assert verify(cluster, "--offline", NODE)[0] == 0
    cluster.boreal("restart", NODE)


def caught_up(cluster: LocalCluster) -> bool:
    status = cluster.status()
    (node,) = (node for node in status["storage"] if node["name"] == NODE)
    return bool(node["scl"] == status["volume"]["vdl"] and node["indexed_lag_bytes"] == 0)
