"""Goal: every pod of deploy/k8s works as closed as its manifest makes it: no root, no writable root
file system, no capabilities, keys that only its group reads; and together they are a database.

Method: Docker runs each pod as rendered (tests/deploy/pods_in_docker.py), and its probes inside it.
Scheduler, claims, Services and NetworkPolicies have no part in this.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.cluster.local import until
from tests.deploy.docker_engine import engine, need_base_image
from tests.deploy.manifests import Pod, kubectl
from tests.deploy.pods_in_docker import PodsInDocker, pods_in_docker

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600)]

_PATIENCE_S = 40
"""More than the endpoints let a connection wait for a writer."""
_CATCH_UP_S = 30.0


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pods")


@pytest.fixture(scope="module")
def pods(scratch: Path) -> Iterator[PodsInDocker]:
    if os.geteuid() != 0:
        pytest.skip("only root can make files as the kubelet makes those of Secrets")
    kubectl()
    with ExitStack() as stack:
        stack.enter_context(engine())
        need_base_image()
        yield stack.enter_context(pods_in_docker(scratch))


@contextmanager
def session(pods: PodsInDocker, endpoint: str, scratch: Path) -> Iterator[psycopg.Connection]:
    """One that insists on TLS and on the certificate's name."""
    secrets = scratch / "k8s" / "overlays" / "kind" / "secrets"
    with psycopg.connect(
        host="localhost",
        port=pods.port(pods.manifests.one("endpoints"), endpoint),
        dbname="postgres",
        user="boreal",
        password=(secrets / "master-password").read_text().strip(),
        sslmode="verify-full",
        sslrootcert=str(secrets / "ca.crt"),
        connect_timeout=_PATIENCE_S,
        autocommit=True,
    ) as connection:
        yield connection


def writer(pods: PodsInDocker) -> Pod:
    control = pods.manifests.one("control")
    said = pods.run(control, "boreal", "--control=127.0.0.1:7000", "status", "--json")
    (name,) = json.loads(said)["endpoints"]["writer"]["instances"]
    return next(pod for pod in pods.manifests.pods if pod.name == name)


def test_pods_answer_all_their_probes(pods: PodsInDocker) -> None:
    for pod in pods.manifests.pods:
        assert all(pods.succeeds(pod, probe) for probe in pod.probes), pod.name


def test_nothing_outside_the_volumes_can_be_written(pods: PodsInDocker) -> None:
    for pod in pods.manifests.pods:
        assert pods.run(pod, "id", "-u") == "10001"
        answer = pods.run(pod, "touch", "/var/lib/boreal/touched", check=False)
        assert "Read-only file system" in answer, pod.name


def test_commits_survive_their_writer(pods: PodsInDocker, scratch: Path) -> None:
    with session(pods, "writer", scratch) as connection:
        connection.execute("CREATE TABLE kept (number int)")
        connection.execute("INSERT INTO kept SELECT generate_series(1, 1000)")
    first = writer(pods)
    pods.kill(first)
    with session(pods, "writer", scratch) as connection:  # waits for the next one
        connection.execute("INSERT INTO kept VALUES (1001)")
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (1001,)
    assert writer(pods).name != first.name
    pods.restart(first)
    pods.wait_ready(first)

    def readers_see_it() -> bool:
        with session(pods, "reader", scratch) as connection:
            assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
            return connection.execute("SELECT count(*) FROM kept").fetchone() == (1001,)

    until(readers_see_it, _CATCH_UP_S, "a reader to have all of it")
