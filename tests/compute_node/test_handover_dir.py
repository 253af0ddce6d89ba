"""Where an instance takes connections accepted elsewhere: within, in a shared place, nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from boreal.engine import Account, Engine
from boreal.types import InstanceName
from compute_node.config import ComputeConfig
from compute_node.configuration import prepare_directories, write_configuration
from compute_node.life import Life
from compute_node.status import status_of

ENGINE = Engine(home=Path("/nowhere"), account=Account.current())


def config(home: Path, shared: Path | None = None, *, handovers: bool = True) -> ComputeConfig:
    return ComputeConfig(
        name=InstanceName("db-1"),
        data_dir=home,
        engine_dir=home / "engine",
        host="0.0.0.0",
        advertise="db-1.far",
        control="control:7000",
        port=7101,
        postgres_port=5432,
        master_password="secret",
        shared_handover_dir=shared,
        takes_handovers=handovers,
    )


def prepared(told: ComputeConfig) -> str:
    """The line of its configuration that says where PostgreSQL's unix sockets are."""
    prepare_directories(told, ENGINE)
    write_configuration(told, ENGINE)
    lines = (told.pgdata / "postgresql.conf").read_text().splitlines()
    return next(line for line in lines if line.startswith("unix_socket_directories"))


def advertised(told: ComputeConfig) -> str:
    return status_of(told, Life(lambda: None), None).handover


def test_it_is_in_the_run_directory(tmp_path: Path) -> None:
    told = config(tmp_path)
    assert f"{tmp_path}/run, {tmp_path}/run/handover" in prepared(told)
    assert advertised(told) == f"{tmp_path}/run/handover/.s.PGSQL.5432"
    assert told.address == "db-1.far:7101"


def test_instances_share_a_place_and_touch_only_their_own(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "db-2").mkdir(parents=True)
    (shared / "db-1").mkdir()
    (shared / "db-1" / ".s.PGSQL.5432.lock").write_text("of a former life")
    told = config(tmp_path / "home", shared)
    assert f"{shared}/db-1" in prepared(told)
    assert list((shared / "db-1").iterdir()) == []
    assert (shared / "db-2").exists()
    assert advertised(told) == f"{shared}/db-1/.s.PGSQL.5432"


@pytest.mark.parametrize("shared", [True, False])
def test_there_may_be_none(tmp_path: Path, shared: bool) -> None:
    told = config(tmp_path, tmp_path / "shared" if shared else None, handovers=False)
    assert "handover" not in prepared(told)
    assert advertised(told) == ""
