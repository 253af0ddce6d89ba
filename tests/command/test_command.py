"""The `boreal` command as its users meet it.

Method: the installed verbs run against a cluster directory whose processes are small programs.
(With services that answer as they are told: test_verify.py, test_instances.py. Whole clusters are
started in tests/cluster.)
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from boreal import cluster
from boreal.command.lifecycle import bring_up, take_down
from boreal.command.main import main
from boreal.command.reporter import Silent
from boreal.command.roster import command_line, listed, ports_of
from boreal.command.settle import UpOptions, settle_config
from boreal.errors import BadUsage, ProcessFailed
from boreal.processes import LocalProcesses
from boreal.waiting import wait_until
from tests.command.kit import boreal

SLEEPER = (sys.executable, "-S", "-c", "import time; print('slept', flush=True); time.sleep(60)")


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


VERBS = [
    *("up", "down", "status", "events", "verify", "psql", "dsn", "logs", "kill", "pause", "resume"),
    *("restart", "add-reader", "remove-reader", "failover", "wait"),
]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_a_data_dir(verb: str) -> None:
    result = CliRunner().invoke(main, [verb, "--help"])
    assert result.exit_code == 0
    assert "--data-dir" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        *(["status"], ["status", "--watch"], ["psql"], ["dsn"], ["logs", "db-1"], ["kill", "sn-1"]),
        *(["verify"], ["events"], ["add-reader"], ["remove-reader", "db-2"], ["failover"]),
    ],
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
    assert "control, endpoints, sn-1, sn-2, sn-3, sn-4, sn-5, sn-6, db-1" in result.output


def test_command_lines_carry_every_port_once(config: cluster.ClusterConfig) -> None:
    for name in config.names:
        words = " ".join(command_line(config, name))
        for port in ports_of(config, name):
            assert words.count(f"={port}") == 1
        assert config.master_password not in words


def test_each_instance_is_told_its_tier_and_the_endpoints_theirs(
    config: cluster.ClusterConfig,
) -> None:
    config = cluster.with_instance(config, tier=3)
    assert "--tier=1" in command_line(config, "db-1")
    words = command_line(config, "db-2")
    assert "--tier=3" in words
    assert f"--postgres-port={config.instance('db-2').postgres_port}" in words
    words = command_line(config, "endpoints")
    assert "control_plane.endpoints" in words
    assert f"--writer-port={config.postgres_port}" in words
    assert f"--reader-port={config.reader_port}" in words


def test_names_in_few_words(config: cluster.ClusterConfig) -> None:
    full = cluster.with_readers(config, 11)
    assert listed(full.names) == "control, endpoints, sn-1 to sn-6, db-1 to db-12"
    assert listed(["db-2", "db-4", "db-5"]) == "db-2, db-4, db-5"
    assert listed(["endpoints"]) == "endpoints"
    assert listed([]) == ""


@pytest.mark.parametrize("verb", ["dsn", "psql"])
def test_two_targets_are_one_too_many(config: cluster.ClusterConfig, verb: str) -> None:
    result = boreal(config.data_dir, verb, "--reader", "--instance", "db-1")
    assert result.exit_code == 2
    assert "two targets" in result.output
    assert boreal(config.data_dir, verb, "--instance", "db-2").exit_code == 2


def test_dsn_names_endpoints_and_instances(config: cluster.ClusterConfig) -> None:
    def dsn(*options: str) -> str:
        return boreal(config.data_dir, "dsn", *options).output.strip()

    assert dsn() == config.dsn
    assert dsn("--reader") == config.reader_dsn
    assert dsn("--instance", "db-1") == config.instance_dsn("db-1")
    assert len({dsn(), dsn("--reader"), dsn("--instance", "db-1")}) == 3


# --- processes -----------------------------------------------------------------------------------


@pytest.fixture
def processes(config: cluster.ClusterConfig) -> LocalProcesses:
    """Three are there; they do nothing."""
    local = LocalProcesses(config.data_dir)
    for name in ("sn-1", "db-1", "endpoints"):
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
    assert "a new epoch" in boreal(config.data_dir, "kill", "db-1").output
    cluster.with_instance(config).save()
    processes.restart("db-1", SLEEPER)
    assert "another instance takes over" in boreal(config.data_dir, "kill", "db-1").output


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
    processes.stop("db-1", "endpoints")
    text = boreal(config.data_dir, "status").output
    assert "control plane does not answer" in text
    found = json.loads(boreal(config.data_dir, "status", "--json").output)
    assert found["control"] == {
        "name": "control", "process": "stopped", "pid": None,
        "address": config.control_address, "answers": False,
        "metrics": f"127.0.0.1:{config.control_metrics_port}",
    }  # fmt: skip
    assert found["storage"][0]["process"] == "running"
    assert found["storage"][0]["pid"] == processes.status("sn-1").pid
    assert found["storage"][0]["scl"] is None
    assert found["compute"][0]["process"] == "stopped"
    assert found["volume"]["ready"] is None
    assert found["endpoints"]["process"] == "stopped"
    assert found["endpoints"]["reader"] == {
        "address": f"127.0.0.1:{config.reader_port}", "instances": []
    }  # fmt: skip
    take_down(config.data_dir)
    assert "the cluster is down" in boreal(config.data_dir, "status").output


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


def test_up_on_a_taken_reader_port_names_another(directory: Path) -> None:
    (free,) = cluster.free_ports(1)
    with socket.create_server((cluster.HOST, 0)) as server:
        port = server.getsockname()[1]
        result = boreal(directory, "up", f"--port={free}", f"--reader-port={port}")
    assert result.exit_code == 2
    assert "boreal up --reader-port" in result.output
    both = boreal(directory, "up", f"--port={free}", f"--reader-port={free}")
    assert both.exit_code == 2
    assert not (directory / "cluster.json").exists()


def test_endpoints_move_together_while_the_cluster_is_down(
    config: cluster.ClusterConfig, settled: Callable[..., cluster.ClusterConfig]
) -> None:
    port = next(port for port in cluster.free_ports(50) if cluster.is_free(port + 1))
    moved = settled(postgres_port=port)
    assert (moved.postgres_port, moved.reader_port) == (port, port + 1)
    (elsewhere,) = cluster.free_ports(1, avoid=[port, port + 1])
    assert settled(reader_port=elsewhere).postgres_port == port
    assert settled().reader_port == elsewhere
    with pytest.raises(BadUsage, match="cannot be both"):
        settled(reader_port=port)


def test_up_adds_readers_and_takes_none_away(
    config: cluster.ClusterConfig, settled: Callable[..., cluster.ClusterConfig]
) -> None:
    assert settled(readers=2).instance_names == ("db-1", "db-2", "db-3")
    assert settled(readers=1) == settled() == cluster.load(config.data_dir)
    assert len(settled().compute) == 3


def test_tls_is_turned_off_and_on_only_when_nothing_runs(
    config: cluster.ClusterConfig, settled: Callable[..., cluster.ClusterConfig]
) -> None:
    assert settled().insecure  # as it was
    assert not settled(insecure=False).insecure
    assert not settled().insecure
    processes = LocalProcesses(config.data_dir)
    processes.start("sn-1", ("sleep", "600"))
    for insecure in (None, False):
        assert not settled(insecure=insecure).insecure
    with pytest.raises(BadUsage, match="boreal down"):
        settled(insecure=True)


def test_a_cluster_without_certificates_is_told_of(config: cluster.ClusterConfig) -> None:
    replace(config, insecure=False).save()
    result = boreal(config.data_dir, "status")
    assert result.exit_code == 2
    assert "boreal up" in result.output


@pytest.fixture
def settled(config: cluster.ClusterConfig) -> Callable[..., cluster.ClusterConfig]:
    """What `up` with these options would start with."""

    def settle(**options: Any) -> cluster.ClusterConfig:
        up = UpOptions(data_dir=config.data_dir, **options)
        return settle_config(up, LocalProcesses(config.data_dir), Silent())

    return settle


def test_up_does_not_move_a_port_in_use(
    config: cluster.ClusterConfig, processes: LocalProcesses
) -> None:
    for option in ("--port", "--reader-port"):
        result = boreal(config.data_dir, "up", option, "5999")
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
