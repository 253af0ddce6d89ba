"""The `boreal` command as its users meet it.

Method: the installed verbs run against a cluster directory whose processes are small programs, and
against a compute agent in this process that answers as it is told. (Whole clusters are started in
tests/cluster.)
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from grpc import aio

from boreal import cluster
from boreal.command.lifecycle import UpOptions, bring_up, take_down
from boreal.command.main import main
from boreal.command.roster import command_line, ports_of
from boreal.errors import BadUsage, ProcessFailed
from boreal.processes import LocalProcesses
from boreal.rpc import common_pb2, compute_pb2, compute_pb2_grpc
from boreal.rpc.edge import make_server
from boreal.waiting import wait_until

SLEEPER = (sys.executable, "-S", "-c", "import time; print('slept', flush=True); time.sleep(60)")
_Context = aio.ServicerContext[Any, Any]


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that an unprivileged PostgreSQL could reach, which pytest's own is not."""
    path = Path(tempfile.mkdtemp(prefix="boreal-command-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    take_down(path)
    shutil.rmtree(path)


@pytest.fixture
def config(directory: Path) -> cluster.ClusterConfig:
    """A cluster of which nothing was ever started."""
    (port,) = cluster.free_ports(1)
    config = cluster.create(directory, postgres_port=port)
    config.save()
    return config


def boreal(directory: Path, *arguments: str) -> Result:
    verb, *others = arguments
    return CliRunner().invoke(main, [verb, f"--data-dir={directory}", *others])


# --- what needs no cluster that runs -------------------------------------------------------------


def test_dsn_is_one_line(config: cluster.ClusterConfig) -> None:
    result = boreal(config.data_dir, "dsn")
    assert result.exit_code == 0
    assert result.output == config.dsn + "\n"
    assert config.master_password in config.dsn


def test_dsn_loads_nothing_heavy(config: cluster.ClusterConfig) -> None:
    code = (
        "import sys; from boreal.command.main import main\n"
        "try: main(['dsn'])\n"
        "except SystemExit: pass\n"
        "heavy = {'grpc', 'rich', 'psycopg', 'psutil', 'structlog', 'asyncio'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=30,
        env={**os.environ, "BOREAL_DATA_DIR": str(config.data_dir)},
        stdout=subprocess.DEVNULL,
    )


VERBS = ["up", "down", "status", "psql", "dsn", "logs", "kill", "pause", "resume", "restart"]


@pytest.mark.parametrize("verb", [*VERBS, "verify"])
def test_every_verb_takes_a_data_dir(verb: str) -> None:
    result = CliRunner().invoke(main, [verb, "--help"])
    assert result.exit_code == 0
    assert "--data-dir" in result.output


@pytest.mark.parametrize(
    "arguments", [["status"], ["psql"], ["dsn"], ["logs", "db-1"], ["kill", "sn-1"], ["verify"]]
)
def test_no_cluster_is_an_error_with_a_remedy(tmp_path: Path, arguments: list[str]) -> None:
    result = boreal(tmp_path, *arguments)
    assert result.exit_code == 2
    assert "error: there is no cluster" in result.output
    assert "boreal up" in result.output
    assert "Traceback" not in result.output


def test_down_without_a_cluster_is_no_error(tmp_path: Path) -> None:
    assert boreal(tmp_path, "down").exit_code == 0
    assert boreal(tmp_path / "nowhere", "down").exit_code == 0


@pytest.mark.parametrize("verb", ["logs", "kill", "pause", "resume", "restart"])
def test_an_unknown_name_is_answered_with_the_names(
    config: cluster.ClusterConfig, verb: str
) -> None:
    result = boreal(config.data_dir, verb, "sn-7")
    assert result.exit_code == 2
    assert "control, sn-1, sn-2, sn-3, sn-4, sn-5, sn-6, db-1" in result.output


def test_command_lines_carry_every_port_once(config: cluster.ClusterConfig) -> None:
    for name in config.names:
        words = " ".join(command_line(config, name))
        for port in ports_of(config, name):
            assert words.count(f"={port}") == 1
        assert config.master_password not in words


# --- processes -----------------------------------------------------------------------------------


@pytest.fixture
def processes(config: cluster.ClusterConfig) -> LocalProcesses:
    """sn-1 and db-1 are there; they do nothing."""
    local = LocalProcesses(config.data_dir)
    for name in ("sn-1", "db-1"):
        local.start(name, SLEEPER)
        written = local.log_path(name).read_text  # by now or a little later
        wait_until(written, timeout_s=20, otherwise=AssertionError)
    return local


def test_kill_pause_resume_act_on_the_process(
    config: cluster.ClusterConfig, processes: LocalProcesses
) -> None:
    def state() -> str:
        return processes.status("sn-1").state.value

    assert boreal(config.data_dir, "pause", "sn-1").exit_code == 0
    assert state() == "paused"
    assert boreal(config.data_dir, "resume", "sn-1").exit_code == 0
    assert state() == "running"
    killed = boreal(config.data_dir, "kill", "sn-1")
    assert "boreal restart sn-1" in killed.output
    assert state() == "dead"
    again = boreal(config.data_dir, "kill", "sn-1")
    assert again.exit_code == 2
    assert "by itself" in boreal(config.data_dir, "kill", "db-1").output


def test_logs_shows_the_end(config: cluster.ClusterConfig, processes: LocalProcesses) -> None:
    processes.log_path("sn-1").write_text("".join(f"line {n}\n" for n in range(100)))
    result = boreal(config.data_dir, "logs", "sn-1", "-n", "2")
    assert result.output.splitlines() == ["line 98", "line 99"]
    missing = boreal(config.data_dir, "logs", "sn-2")
    assert missing.exit_code == 2
    assert "no log yet" in missing.output


async def test_logs_follows(config: cluster.ClusterConfig, processes: LocalProcesses) -> None:
    path = processes.log_path("sn-1")
    path.write_text("before\n")
    reader = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "boreal.command.main", "logs", "sn-1", "--follow"),
        env={**os.environ, "BOREAL_DATA_DIR": str(config.data_dir)},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert reader.stdout is not None
        async with asyncio.timeout(20):
            assert await reader.stdout.readline() == b"before\n"
            with path.open("a") as log:
                log.write("after\n")
            assert await reader.stdout.readline() == b"after\n"
    finally:
        reader.terminate()
        await reader.communicate()


def test_status_without_a_control_plane_says_so(
    config: cluster.ClusterConfig, processes: LocalProcesses
) -> None:
    processes.stop("db-1")
    text = boreal(config.data_dir, "status").output
    assert "control plane does not answer" in text
    found = json.loads(boreal(config.data_dir, "status", "--json").output)
    assert found["control"] == {
        "name": "control", "process": "stopped", "pid": None, "answers": False
    }  # fmt: skip
    assert found["storage"][0]["process"] == "running"
    assert found["storage"][0]["pid"] == processes.status("sn-1").pid
    assert found["storage"][0]["scl"] is None
    assert found["compute"][0]["process"] == "stopped"
    assert found["volume"]["ready"] is None
    take_down(config.data_dir)
    assert "the cluster is down" in boreal(config.data_dir, "status").output


# --- verify --------------------------------------------------------------------------------------


class Agent(compute_pb2_grpc.ComputeServicer):
    """A compute agent that answers as it is told."""

    def __init__(self) -> None:
        self.state = compute_pb2.WRITER
        self.events: Sequence[compute_pb2.VerifyEvent] = ()
        self.asked: list[compute_pb2.VerifyRequest] = []

    async def GetStatus(  # noqa: N802
        self, request: compute_pb2.GetComputeStatusRequest, context: _Context
    ) -> compute_pb2.ComputeStatus:
        volume = common_pb2.VolumeRef(volume_id="vol-1", epoch=4)
        return compute_pb2.ComputeStatus(instance="db-1", state=self.state, volume=volume)

    async def TakeBundle(  # noqa: N802
        self, request: compute_pb2.TakeBundleRequest, context: _Context
    ) -> compute_pb2.TakeBundleResponse:
        return compute_pb2.TakeBundleResponse()

    async def Verify(  # noqa: N802
        self, request: compute_pb2.VerifyRequest, context: _Context
    ) -> AsyncIterator[compute_pb2.VerifyEvent]:
        self.asked.append(request)
        for event in self.events:
            yield event


@pytest.fixture
async def agent(config: cluster.ClusterConfig) -> AsyncIterator[Agent]:
    agent = Agent()
    server = make_server()
    compute_pb2_grpc.add_ComputeServicer_to_server(agent, server)
    server.add_insecure_port(config.agent_address)
    await server.start()
    yield agent
    await server.stop(None)


def summary(differences: int) -> compute_pb2.VerifyEvent:
    return compute_pb2.VerifyEvent(
        summary=compute_pb2.VerifySummary(
            pages=1607, relations=495, databases=2, differences=differences, nodes=["sn-1"]
        )
    )


async def verify(config: cluster.ClusterConfig, *arguments: str) -> Result:
    return await asyncio.to_thread(boreal, config.data_dir, "verify", *arguments)


async def test_verify_reports_totals(config: cluster.ClusterConfig, agent: Agent) -> None:
    progress = compute_pb2.VerifyProgress(pages_done=5, pages_total=1607)
    agent.events = [compute_pb2.VerifyEvent(progress=progress), summary(0)]
    result = await verify(config, "--node", "sn-1", "--node", "sn-4")
    assert result.exit_code == 0
    assert "1607" in result.output
    assert list(agent.asked[0].nodes) == ["sn-1", "sn-4"]
    assert (agent.asked[0].volume.volume_id, agent.asked[0].volume.epoch) == ("vol-1", 4)


async def test_verify_names_what_differs_and_fails(
    config: cluster.ClusterConfig, agent: Agent
) -> None:
    page = compute_pb2.PageDifference(
        node="sn-1", database="postgres", relation="public.t", block=7, reason="byte 30"
    )
    agent.events = [compute_pb2.VerifyEvent(difference=page), summary(1)]
    result = await verify(config)
    assert result.exit_code == 1
    for word in ("sn-1", "public.t", "block 7", "byte 30"):
        assert word in result.output.replace("\n", " ")


async def test_verify_wants_the_writer_and_an_end(
    config: cluster.ClusterConfig, agent: Agent
) -> None:
    cut_off = await verify(config)
    assert cut_off.exit_code == 1
    assert "without a result" in cut_off.output
    agent.state = compute_pb2.READER
    reader = await verify(config)
    assert reader.exit_code == 1
    assert "reader" in reader.output
    assert (await verify(config, "--node", "db-1")).exit_code == 2


async def test_verify_tells_seconds_and_orphans(
    config: cluster.ClusterConfig, agent: Agent
) -> None:
    agent.events = [
        compute_pb2.VerifyEvent(
            difference=compute_pb2.PageDifference(node="sn-4", relation="1663/5/77", reason="odd")
        ),
        compute_pb2.VerifyEvent(
            difference=compute_pb2.PageDifference(node="sn-5", reason="it was not compared")
        ),
        compute_pb2.VerifyEvent(
            summary=compute_pb2.VerifySummary(pages=10, differences=2, orphans=3, orphan_pages=9)
        ),
    ]
    result = await verify(config)
    assert result.exit_code == 1
    for words in ("pages/s", "(orphan) 1663/5/77", "sn-5: it was not", "3  forks that no catalog"):
        assert words in " ".join(result.output.split("\n"))


@pytest.mark.parametrize("place", ["sn-1", "path"])
def test_verify_offline_checks_a_directory(
    directory: Path, place: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Found by name or by path; what it exits with is what the check does."""
    node = directory / "sn-1"
    where = place if place == "sn-1" else str(node)
    assert boreal(directory, "verify", "--offline", where).exit_code == 2
    assert "not the directory of a storage node" in capfd.readouterr().err
    (node / "volumes").mkdir(parents=True)
    (node / "lock").touch()
    assert boreal(directory, "verify", "--offline", where).exit_code == 0
    assert "0 damages" in capfd.readouterr().out


# --- up ------------------------------------------------------------------------------------------


def test_the_log_to_retain_reaches_the_storage_nodes(config: cluster.ClusterConfig) -> None:
    def words() -> tuple[str, ...]:
        return command_line(cluster.load(config.data_dir), "sn-3")

    assert not any("retain" in word for word in words())
    replace(config, retain_log_mib=48).save()
    assert "--retain-log-mib=48" in words()


def test_up_on_a_taken_port_names_another(directory: Path) -> None:
    with socket.create_server((cluster.HOST, 0)) as server:
        port = server.getsockname()[1]
        result = boreal(directory, "up", "--port", str(port))
    assert result.exit_code == 2
    assert f"port {port}" in result.output
    assert "boreal up --port" in result.output
    assert not (directory / "cluster.json").exists()
    assert LocalProcesses(directory).names() == []


def test_up_does_not_move_a_port_in_use(
    config: cluster.ClusterConfig, processes: LocalProcesses
) -> None:
    result = boreal(config.data_dir, "up", "--port", "5999")
    assert result.exit_code == 2
    assert "boreal down" in result.output


def test_up_while_another_is_at_work(config: cluster.ClusterConfig) -> None:
    with LocalProcesses(config.data_dir).one_command_at_a_time():
        result = boreal(config.data_dir, "up")
    assert result.exit_code == 2
    assert f"pid {os.getpid()}" in result.output


def test_up_that_fails_shows_the_culprits_last_words(config: cluster.ClusterConfig) -> None:
    (config.data_dir / "control").mkdir()
    (config.data_dir / "control" / "control.db").write_text("something else " * 1000)
    with pytest.raises(ProcessFailed, match="not a database") as failure:
        bring_up(UpOptions(data_dir=config.data_dir))
    assert failure.value.message.startswith("control ended")
    assert "boreal logs control" in failure.value.message
    take_down(config.data_dir)
    assert LocalProcesses(config.data_dir).names() == []


def test_up_with_a_port_of_a_missing_process_taken(
    config: cluster.ClusterConfig, processes: LocalProcesses
) -> None:
    with (
        socket.create_server((cluster.HOST, config.storage[3].frames_port)),
        pytest.raises(BadUsage, match="which sn-4 needs"),
    ):
        bring_up(UpOptions(data_dir=config.data_dir))
