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
    assert len(ports) == len(set(ports)) == 20
    ephemeral_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < max(ephemeral_from, 11_000)
    assert [(entry.name, entry.zone) for entry in config.storage] == list(cluster.ZONES.items())
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
    assert len(set(cluster.internal_ports(fresh))) == 20


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
