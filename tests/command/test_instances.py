"""Instances come and go, the writer's role moves, and people are told.

Method: processes that do nothing, beside a control plane and agents that answer as they are told.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator

import pytest

from boreal import cluster
from boreal.cluster import ClusterConfig
from boreal.command import status
from boreal.errors import BadUsage, NotNow
from boreal.processes import LocalProcesses, ProcessState
from boreal.rpc import compute_pb2, control_pb2
from tests.command.kit import Agent, Control, boreal, boreal_meanwhile, serving

SLEEPER = (sys.executable, "-S", "-c", "import time; time.sleep(60)")
Event = control_pb2.Event


@pytest.fixture
def config(config: ClusterConfig) -> ClusterConfig:
    """A cluster of three instances."""
    config = cluster.with_readers(config, 2)
    config.save()
    return config


@pytest.fixture
def processes(config: ClusterConfig) -> LocalProcesses:
    """All of them are there; they do nothing."""
    local = LocalProcesses(config.data_dir)
    for name in config.names:
        local.start(name, SLEEPER)
    return local


@pytest.fixture
async def control(config: ClusterConfig) -> AsyncIterator[Control]:
    """It knows all three, and says that db-1 is the writer."""
    control = Control()
    control.status.writer = "db-1"
    for name in config.instance_names:
        control.status.instances.add().status.instance = name
    async with serving(config, control):
        yield control


# --- who comes and goes --------------------------------------------------------------------------


def test_a_reader_of_a_cluster_that_is_down_is_added_only(config: ClusterConfig) -> None:
    result = boreal(config.data_dir, "add-reader", "--tier", "0")
    assert result.exit_code == 0
    assert "`boreal up` will start it" in result.output
    entry = cluster.load(config.data_dir).instance("db-4")
    assert entry.tier == 0
    assert result.output.splitlines()[-1].endswith(f":{entry.postgres_port}/postgres")
    assert LocalProcesses(config.data_dir).names() == []


def test_a_tier_is_from_0_to_15(config: ClusterConfig) -> None:
    assert boreal(config.data_dir, "add-reader", "--tier", "16").exit_code == 2
    assert cluster.load(config.data_dir) == config


async def test_a_reader_is_removed_with_its_files(
    config: ClusterConfig, processes: LocalProcesses, control: Control
) -> None:
    (config.data_dir / "db-2" / "pgdata").mkdir(parents=True)
    control.refusals = [BadUsage("db-2 is alive")]  # it has not noticed yet
    result = await boreal_meanwhile(config.data_dir, "remove-reader", "db-2")
    assert result.exit_code == 0, result.output
    assert control.asked.removals == ["db-2", "db-2"]
    assert cluster.load(config.data_dir).instance_names == ("db-1", "db-3")
    assert "db-2" not in processes.names()
    assert not (config.data_dir / "db-2").exists()
    again = await boreal_meanwhile(config.data_dir, "remove-reader", "db-2")
    assert again.exit_code == 2
    assert "instances are db-1, db-3" in again.output


async def test_one_that_the_control_plane_never_met_is_removed(
    config: ClusterConfig, control: Control
) -> None:
    del control.status.instances[1]
    result = await boreal_meanwhile(config.data_dir, "remove-reader", "db-2")
    assert result.exit_code == 0, result.output
    assert control.asked.removals == []
    assert cluster.load(config.data_dir).instance_names == ("db-1", "db-3")


async def test_the_writer_is_not_removed(
    config: ClusterConfig, processes: LocalProcesses, control: Control
) -> None:
    result = await boreal_meanwhile(config.data_dir, "remove-reader", "db-1")
    assert result.exit_code == 2
    assert "boreal failover" in result.output
    assert control.asked.removals == []
    assert processes.status("db-1").alive


async def test_one_that_becomes_the_writer_meanwhile_is_started_again(
    config: ClusterConfig,
    processes: LocalProcesses,
    control: Control,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("boreal.command.instances._FORGOTTEN_BOUND_S", 0.2)
    control.refusals = [BadUsage("db-2 is the writer")] * 100
    before = processes.status("db-2").pid
    result = await boreal_meanwhile(config.data_dir, "remove-reader", "db-2")
    assert result.exit_code == 2
    assert "db-2 is the writer" in result.output
    assert processes.status("db-2").state in {ProcessState.RUNNING, ProcessState.DEAD}
    assert processes.status("db-2").pid != before
    assert "db-2" in cluster.load(config.data_dir).instance_names


def test_the_only_instance_stays(config: ClusterConfig) -> None:
    alone = cluster.without_instance(cluster.without_instance(config, "db-2"), "db-3")
    alone.save()
    result = boreal(config.data_dir, "remove-reader", "db-1")
    assert result.exit_code == 2
    assert "only instance" in result.output


@pytest.mark.parametrize(
    "arguments", [["remove-reader", "db-2"], ["failover"], ["events"]], ids=lambda words: words[0]
)
def test_without_a_control_plane_the_remedy_is_told(
    config: ClusterConfig, arguments: list[str]
) -> None:
    result = boreal(config.data_dir, *arguments)
    assert result.exit_code == 2
    assert "boreal restart control" in result.output


# --- failover ------------------------------------------------------------------------------------


async def test_failover_names_the_new_writer(config: ClusterConfig, control: Control) -> None:
    result = await boreal_meanwhile(config.data_dir, "failover", "--target", "db-3")
    assert result.exit_code == 0
    assert result.output == "db-3 is the writer, epoch 5; it took 0.64 s\n"
    await boreal_meanwhile(config.data_dir, "failover")
    assert control.asked.failovers == ["db-3", ""]


async def test_failover_refused_says_why(config: ClusterConfig, control: Control) -> None:
    control.refusals = [NotNow("a failover to db-2 is under way")]
    result = await boreal_meanwhile(config.data_dir, "failover")
    assert result.exit_code == 1
    assert "a failover to db-2 is under way" in result.output
    unknown = await boreal_meanwhile(config.data_dir, "failover", "--target", "db-9")
    assert unknown.exit_code == 2
    assert "db-1, db-2, db-3" in unknown.output
    assert control.asked.failovers == [""]


# --- events --------------------------------------------------------------------------------------

HAPPENED = (
    Event(
        id=7, unix_ms=1_700_000_000_123, kind=Event.FAILOVER_STARTED, instance="db-2", message="go"
    ),
    Event(
        id=9, unix_ms=1_700_000_000_900, kind=Event.FAILOVER_COMPLETED, instance="db-2", took_ms=777
    ),
)


async def test_events_for_people(config: ClusterConfig, control: Control) -> None:
    control.events = list(HAPPENED)
    lines = (await boreal_meanwhile(config.data_dir, "events")).output.splitlines()
    assert len(lines) == 2
    assert ".123 " in lines[0]
    assert "failover started" in lines[0]
    assert lines[1].endswith("(0.78 s)")


async def test_events_for_programs(config: ClusterConfig, control: Control) -> None:
    control.events = list(HAPPENED)
    lines = (await boreal_meanwhile(config.data_dir, "events", "--json")).output.splitlines()
    first, second = map(json.loads, lines)
    assert first == {
        "id": 7,
        "at": "2023-11-14T22:13:20.123+00:00",
        "kind": "failover_started",
        "instance": "db-2",
        "message": "go",
        "took_ms": None,
    }
    assert (second["kind"], second["took_ms"]) == ("failover_completed", 777)


async def test_events_follows(config: ClusterConfig, control: Control) -> None:
    control.events = [HAPPENED[0]]
    reader = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "boreal.command.main", "events", "--follow", "--json"),
        f"--data-dir={config.data_dir}",
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert reader.stdout is not None
        async with asyncio.timeout(20):
            assert json.loads(await reader.stdout.readline())["id"] == 7
            control.events.append(HAPPENED[1])
            assert json.loads(await reader.stdout.readline())["id"] == 9
    finally:
        reader.terminate()
        await reader.communicate()


# --- status --------------------------------------------------------------------------------------


def agents() -> tuple[Agent, Agent, Agent]:
    """db-2 is the writer, db-1 was and has not noticed, db-3 reads."""
    deposed, writer, reader = Agent("db-1"), Agent("db-2"), Agent("db-3")
    deposed.status.MergeFrom(
        compute_pb2.ComputeStatus(state=compute_pb2.WRITER, vdl=0x1000, takes_clients=True)
    )
    deposed.status.volume.epoch = 3
    link = compute_pb2.LinkStatus(node="sn-2", state="streaming", scl=0x2000, ack_latency_us=1500)
    writer.status.MergeFrom(
        compute_pb2.ComputeStatus(
            state=compute_pb2.WRITER, vdl=0x2000, flush_lsn=0x2100, links=[link]
        )
    )
    reader.status.MergeFrom(
        compute_pb2.ComputeStatus(vdl=0x1F00, replay_lsn=0x1E00, replay_lag_us=2500, tier=1)
    )
    return deposed, writer, reader


async def test_status_tells_roles_lags_and_endpoints(
    config: ClusterConfig, processes: LocalProcesses, control: Control
) -> None:
    control.status.writer = "db-2"
    deposed, writer, reader = agents()
    async with serving(config, deposed, writer, reader):
        printed = await boreal_meanwhile(config.data_dir, "status", "--json")
        table = await boreal_meanwhile(config.data_dir, "status")
    found = json.loads(printed.output)
    assert found["writer"] == "db-2"
    assert found["volume"] == {"id": "vol-1", "ready": True, "epoch": 4, "vdl": "0/2000"}
    assert found["endpoints"]["writer"]["instances"] == ["db-2"]
    assert found["endpoints"]["reader"]["instances"] == ["db-3"]
    one, two, three = found["compute"]
    assert [row["role"] for row in (one, two, three)] == ["writer", "writer", "reader"]
    assert (two["lag_bytes"], two["lag_ms"], two["flush_lsn"]) == (None, None, "0/2100")
    assert (three["lag_bytes"], three["lag_ms"], three["tier"]) == (0x200, 2.5, 1)
    assert three["address"] == f"127.0.0.1:{config.instance('db-3').postgres_port}"
    for word in ("db-2", "512 B", "2.5", "1.5", f":{config.reader_port}", "→ db-3"):
        assert word in table.output


async def test_the_reader_endpoint_falls_back_to_the_writer(
    config: ClusterConfig, processes: LocalProcesses
) -> None:
    _, writer, reader = agents()
    reader.status.takes_clients = False
    async with serving(config, writer, reader):
        found = status.to_json(await status.gather(config))
    assert found["endpoints"]["reader"]["instances"] == ["db-2"]
    assert found["control"]["answers"] is False
    assert found["writer"] == "db-2"
    assert found["compute"][2]["takes_clients"] is False
    assert found["compute"][0]["role"] is None
