"""A cluster elsewhere, of which only the control plane's address is known.

Method: the verbs, with a control plane that answers as it is told and no cluster directory at all.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from boreal.certificates import issue
from boreal.cluster import HOST, free_ports
from boreal.command.main import main
from boreal.command.remote import Outside, connect
from boreal.command.status import gather_by, to_json
from boreal.rpc import compute_pb2, control_pb2, control_pb2_grpc
from boreal.rpc.edge import make_server
from boreal.rpc.health import add_health
from boreal.rpc.identity import Identity
from tests.command.kit import VOLUME, Control


class Elsewhere:
    """The control plane, and how to call the command."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.control = Control()
        self.ready = True

    async def boreal(self, *arguments: str) -> Result:
        return await asyncio.to_thread(
            CliRunner().invoke, main, ["--insecure", "--control", self.address, *arguments]
        )


def instance(name: str, state: compute_pb2.ComputeState.ValueType) -> control_pb2.InstanceStatus:
    found = control_pb2.InstanceStatus(address=f"{name}.far:7101", postgres_port=5432, alive=True)
    found.status.CopyFrom(
        compute_pb2.ComputeStatus(
            instance=name,
            incarnation=f"{name}/1",
            state=state,
            volume=VOLUME,
            takes_clients=True,
            tier=1,
        )
    )
    return found


@pytest.fixture
async def elsewhere() -> AsyncIterator[Elsewhere]:
    """db-2 writes, db-1 reads; sn-1 is there."""
    there = Elsewhere(f"{HOST}:{free_ports(1)[0]}")
    status = there.control.status
    status.writer = "db-2"
    node = status.storage.add(alive=True)
    node.node.CopyFrom(control_pb2.StorageNode(name="sn-1", zone="a"))
    node.segments.add(volume_id="vol-1", scl=0x2000, vdl=0x2000)
    status.instances.append(instance("db-1", compute_pb2.READER))
    status.instances.append(instance("db-2", compute_pb2.WRITER))
    server = make_server()
    control_pb2_grpc.add_ControlServicer_to_server(there.control, server)
    add_health(server, lambda: there.ready)
    server.add_insecure_port(there.address)
    await server.start()
    yield there
    await server.stop(None)


async def test_status(elsewhere: Elsewhere) -> None:
    found = json.loads((await elsewhere.boreal("status", "--json")).output)
    assert found["data_dir"] is None
    control = found["control"]
    assert (control["address"], control["process"]) == (elsewhere.address, None)
    assert found["writer"] == "db-2"
    (node,) = found["storage"]
    assert (node["name"], node["zone"], node["alive"], node["lag_bytes"]) == ("sn-1", "a", True, 0)
    assert [(row["name"], row["role"], row["address"]) for row in found["compute"]] == [
        ("db-1", "reader", "db-1.far:5432"),
        ("db-2", "writer", "db-2.far:5432"),
    ]
    table = (await elsewhere.boreal("status")).output
    for word in ("writer db-2", "answers", "→ db-1", "sn-1", "alive", "serves"):
        assert word in table


async def test_failover_and_events(elsewhere: Elsewhere) -> None:
    done = await elsewhere.boreal("failover", "--target=db-1")
    assert "db-1 is the writer" in done.output
    assert elsewhere.control.asked.failovers == ["db-1"]
    elsewhere.control.events.append(
        control_pb2.Event(id=1, kind=control_pb2.Event.VOLUME_CREATED, message="vol-1")
    )
    listed = await elsewhere.boreal("events", "--json")
    assert json.loads(listed.output)["kind"] == "volume_created"


async def test_waiting_ends_once_sql_is_served(elsewhere: Elsewhere) -> None:
    writer = elsewhere.control.status.instances[1]
    writer.status.takes_clients = False
    refused = await elsewhere.boreal("wait", "--timeout=0.3")
    assert refused.exit_code == 1
    assert "writer: none; readers: db-1" in refused.output
    waiting = asyncio.create_task(elsewhere.boreal("wait", "--readers=1", "--timeout=30"))
    writer.status.takes_clients = True
    assert "db-2 is the writer; readers: db-1" in (await waiting).output


async def test_an_address_where_nobody_is(elsewhere: Elsewhere) -> None:
    elsewhere.address = f"{HOST}:{free_ports(1)[0]}"
    for verb in ("status", "events", "failover"):
        result = await elsewhere.boreal(verb)
        assert result.exit_code == 2
        assert f"no control plane answers at {elsewhere.address}" in result.output
    away = Outside(control_address=elsewhere.address)
    async with connect(away) as remote:  # as `status --watch` asks
        assert to_json(await gather_by(away, remote))["control"]["answers"] is False


async def test_verbs_that_need_the_clusters_directory_say_so(elsewhere: Elsewhere) -> None:
    result = await elsewhere.boreal("kill", "sn-1")
    assert result.exit_code == 2
    assert "leave out --control" in result.output


async def test_the_environment_names_it_too(
    elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOREAL_CONTROL", elsewhere.address)
    monkeypatch.setenv("BOREAL_INSECURE", "1")
    result = await asyncio.to_thread(CliRunner().invoke, main, ["status"])
    assert "writer db-2" in result.output
    here = CliRunner().invoke(main, ["status", f"--data-dir={tmp_path}"])
    assert "there is no cluster" in here.output
    assert CliRunner().invoke(main, ["down", f"--data-dir={tmp_path}"]).exit_code == 0


async def test_who_asks_must_be_said(elsewhere: Elsewhere) -> None:
    for verb in (["status"], ["health", elsewhere.address]):
        result = CliRunner().invoke(main, ["--control", elsewhere.address, *verb])
        assert result.exit_code == 2
        assert "--tls-dir" in result.output


async def test_it_is_said_by_a_certificate(tmp_path: Path) -> None:
    issue(tmp_path, ["control", "boreal"])
    there = Elsewhere(f"{HOST}:{free_ports(1)[0]}")
    there.control.status.writer = "db-2"
    server = make_server()
    control_pb2_grpc.add_ControlServicer_to_server(there.control, server)
    add_health(server)
    credentials = Identity.load(tmp_path / "control").server_credentials()
    server.add_secure_port(there.address, credentials)
    await server.start()
    told = [f"--tls-dir={tmp_path}/boreal", "--control", there.address]
    for verb in (["status"], ["health", there.address]):
        done = await asyncio.to_thread(CliRunner().invoke, main, [*told, *verb])
        assert done.exit_code == 0, done.output
    assert (await there.boreal("health", there.address)).exit_code == 1  # without one
    await server.stop(None)


async def test_health(elsewhere: Elsewhere) -> None:
    assert (await elsewhere.boreal("health", elsewhere.address)).exit_code == 0
    assert (await elsewhere.boreal("health", "--ready", elsewhere.address)).exit_code == 0
    elsewhere.ready = False
    assert (await elsewhere.boreal("health", elsewhere.address)).exit_code == 0
    unready = await elsewhere.boreal("health", "--ready", elsewhere.address)
    assert unready.exit_code == 1
    assert "does not do its work" in unready.output
    nobody = await elsewhere.boreal("health", f"{HOST}:{free_ports(1)[0]}")
    assert nobody.exit_code == 1
    assert "cannot be reached" in nobody.output
