"""`boreal verify` finds the writer and tells what it hears. Method: agents that answer as told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from click.testing import Result

from boreal import cluster
from boreal.command.remote import connect
from boreal.rpc import compute_pb2
from tests.command.kit import VOLUME, Agent, boreal, boreal_meanwhile, serving


@pytest.fixture
async def agents(config: cluster.ClusterConfig) -> AsyncIterator[list[Agent]]:
    """Of two instances; the second is the writer."""
    config = cluster.with_readers(config, 1)
    config.save()
    agents = [Agent("db-1"), Agent("db-2")]
    agents[1].status.state = compute_pb2.WRITER
    async with serving(config, *agents):
        yield agents


@pytest.fixture
def agent(agents: list[Agent]) -> Agent:
    """The writer's."""
    return agents[1]


def summary(differences: int) -> compute_pb2.VerifyEvent:
    return compute_pb2.VerifyEvent(
        summary=compute_pb2.VerifySummary(
            pages=1607, relations=495, databases=2, differences=differences, nodes=["sn-1"]
        )
    )


async def verify(config: cluster.ClusterConfig, *arguments: str) -> Result:
    return await boreal_meanwhile(config.data_dir, "verify", *arguments)


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
    config: cluster.ClusterConfig, agents: list[Agent]
) -> None:
    cut_off = await verify(config)
    assert cut_off.exit_code == 1
    assert "without a result" in cut_off.output
    agents[1].status.state = compute_pb2.YIELDING
    nobody = await verify(config)
    assert nobody.exit_code == 1
    assert "db-1 is reader, db-2 is yielding" in nobody.output
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


async def test_one_that_was_deposed_and_does_not_know_is_not_the_writer(
    config: cluster.ClusterConfig, agents: list[Agent]
) -> None:
    deposed, writer = agents
    deposed.status.state = compute_pb2.WRITER
    deposed.status.volume.epoch = VOLUME.epoch - 1
    async with connect(cluster.load(config.data_dir)) as remote:
        assert (await remote.writer()).instance == "db-2"
        assert (await remote.take_bundle()).end_lsn == 77
    assert (deposed.bundles, writer.bundles) == (0, 1)


async def test_without_any_instance_it_says_so(config: cluster.ClusterConfig) -> None:
    result = await verify(config)
    assert result.exit_code == 1
    assert "none of them answers" in result.output


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
