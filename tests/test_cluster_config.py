"""cluster.json, ports and the data directory.

Method: real files and real sockets; where it matters who one is, both cases are checked.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from boreal import cluster
from boreal.errors import BadUsage

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="about what root may not do")


@pytest.fixture
def config(tmp_path: Path) -> cluster.ClusterConfig:
    return cluster.create(tmp_path, postgres_port=5)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server((cluster.HOST, 0)) as server:
        yield server.getsockname()[1]


def test_what_was_saved_is_loaded(config: cluster.ClusterConfig) -> None:
    config.save()
    assert cluster.load(config.data_dir) == config
    assert config.password_file.read_text().strip() == config.master_password
    for path in (config.data_dir / "cluster.json", config.password_file):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_directory_may_be_moved(config: cluster.ClusterConfig, tmp_path: Path) -> None:
    config.save()
    moved = shutil.copytree(config.data_dir, tmp_path / "moved")
    assert cluster.load(moved) == replace(config, data_dir=moved)


def test_every_port_and_password_is_its_own(config: cluster.ClusterConfig) -> None:
    ports = cluster.internal_ports(config)
    assert len(ports) == len(set(ports)) == 42
    ephemeral_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < max(ephemeral_from, 11_000)
    assert [(entry.name, entry.zone) for entry in config.storage] == list(cluster.ZONES.items())
    assert {config.postgres_port, config.reader_port}.isdisjoint(ports)
    other = cluster.create(config.data_dir, postgres_port=5)
    assert other.master_password != config.master_password
    assert len(config.master_password) >= 20


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"storage": [{"name": 1}]}'])
def test_a_broken_file_is_said_to_be_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "cluster.json").write_text(content)
    with pytest.raises(BadUsage, match="not a cluster file"):
        cluster.load(tmp_path)


def test_a_file_of_another_version_is_said_to_be_one(config: cluster.ClusterConfig) -> None:
    config.save()
    path = config.data_dir / "cluster.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "color": "blue"}))
    with pytest.raises(BadUsage, match=r"another version .* color"):
        cluster.load(config.data_dir)


def test_a_file_from_before_there_were_readers_is_refused(config: cluster.ClusterConfig) -> None:
    config.save()
    path = config.data_dir / "cluster.json"
    old = json.loads(path.read_text())
    del old["compute"], old["reader_port"]
    path.write_text(json.dumps({**old, "agent_port": 7}))
    with pytest.raises(BadUsage, match=r"another version .* agent_port.*--data-dir"):
        cluster.load(config.data_dir)


def test_no_cluster_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(BadUsage, match="boreal up"):
        cluster.load(tmp_path)


def test_only_taken_ports_move(config: cluster.ClusterConfig, taken: int) -> None:
    first = replace(config.storage[0], pages_port=taken)
    config = replace(config, storage=(first, *config.storage[1:]))
    fresh, moved = cluster.with_free_ports(config)
    assert list(moved) == [taken]
    assert fresh.storage[0] == replace(first, pages_port=moved[taken])
    assert replace(fresh, storage=config.storage) == config
    assert len(set(cluster.internal_ports(fresh))) == 42


def test_an_instances_port_moves_only_if_taken(config: cluster.ClusterConfig, taken: int) -> None:
    first = replace(config.compute[0], postgres_port=taken)
    fresh, moved = cluster.with_free_ports(replace(config, compute=(first,)))
    assert fresh.compute == (replace(first, postgres_port=moved[taken]),)


# --- endpoints and instances ---------------------------------------------------------------------


def test_the_reader_endpoint_is_next_to_the_writer_endpoint(tmp_path: Path) -> None:
    port = next(port for port in cluster.free_ports(50) if cluster.is_free(port + 1))
    config = cluster.create(tmp_path, postgres_port=port)
    assert (config.postgres_port, config.reader_port) == (port, port + 1)
    assert f":{port}/" in config.dsn
    assert f":{port + 1}/" in config.reader_dsn
    with socket.create_server((cluster.HOST, port + 1)):
        assert cluster.is_free(cluster.create(tmp_path, postgres_port=port).reader_port)
    assert cluster.reader_port_for(65_535) < 65_535
    assert cluster.create(tmp_path, postgres_port=port, reader_port=7).reader_port == 7


def test_readers_are_added_up_to_fifteen(config: cluster.ClusterConfig) -> None:
    assert config.instance_names == ("db-1",)
    full = cluster.with_readers(config, 15)
    assert full.instance_names == tuple(f"db-{n}" for n in range(1, 17))
    assert full.compute[0] == config.compute[0]
    assert len(set(cluster.internal_ports(full))) == 42 + 3 * 15
    assert cluster.with_readers(full, 3) == full
    with pytest.raises(BadUsage, match=r"at most 16 instances.*remove-reader"):
        cluster.with_instance(full)
    full.save()
    assert cluster.load(full.data_dir) == full


def test_prometheus_is_told_of_every_process(config: cluster.ClusterConfig) -> None:
    cluster.with_readers(config, 2).save()
    path = config.data_dir / "prometheus-targets.json"
    assert stat.S_IMODE(path.stat().st_mode) & 0o044  # it runs as another user
    groups = json.loads(path.read_text())
    who = [(each["labels"]["instance"], each["labels"]["component"]) for each in groups]
    assert len(who) == len(set(who)) == 2 + 2 * 6 + 3
    addresses = [address for each in groups for address in each["targets"]]
    ports = {int(address.removeprefix(f"{cluster.HOST}:")) for address in addresses}
    assert len(ports) == len(who)
    assert {each["labels"].get("zone") for each in groups} == {None, "a", "b", "c"}
    cluster.with_readers(config, 3).save()
    assert len(json.loads(path.read_text())) == len(groups) + 1


def test_a_freed_name_is_given_again(config: cluster.ClusterConfig) -> None:
    three = cluster.with_readers(config, 2)
    two = cluster.without_instance(three, "db-2")
    assert two.instance_names == ("db-1", "db-3")
    again = cluster.with_instance(two, tier=0)
    assert again.instance_names == ("db-1", "db-2", "db-3")
    assert again.instance("db-2").tier == 0
    assert again.instance("db-3") == three.instance("db-3")


def test_who_is_who(config: cluster.ClusterConfig) -> None:
    config = cluster.with_readers(config, 1)
    assert config.names == (
        "control", "endpoints", "sn-1", "sn-2", "sn-3", "sn-4", "sn-5", "sn-6", "db-1", "db-2"
    )  # fmt: skip
    entry = config.instance("db-2")
    assert entry.agent_address == f"127.0.0.1:{entry.agent_port}"
    assert f":{entry.postgres_port}/" in config.instance_dsn("db-2")
    for unknown in ("db-3", "sn-1"):
        with pytest.raises(BadUsage, match="instances are db-1, db-2"):
            config.instance_dsn(unknown)


def test_a_taken_port_is_not_free(taken: int) -> None:
    assert not cluster.is_free(taken)
    with pytest.raises(BadUsage, match="free ports"):
        cluster.free_ports(1, free=lambda _: False)


def test_the_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        assert cluster.default_data_dir() == Path("/var/lib/boreal")
        return
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert cluster.default_data_dir() == Path("/somewhere/boreal")


@as_root
def test_a_closed_directory_is_refused_to_root() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as closed:
        with pytest.raises(BadUsage, match=f"chmod o.x {closed}"):
            cluster.prepare_directory(Path(closed) / "data")
        Path(closed).chmod(0o711)
        cluster.prepare_directory(Path(closed) / "data")


def test_an_impossible_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadUsage, match="cannot make"):
        cluster.prepare_directory(tmp_path / "file" / "data")
