"""A cluster in containers, by the repository's own Makefile and compose file, under its own names.

So it disturbs none that runs: the project, the containers' prefix, the ports, the secrets and the
image are its own, and nothing of them is left afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from boreal.cluster import HOST, free_ports
from boreal.command.card import psql_program
from tests.cluster.local import BOREAL, until
from tests.deploy.docker_engine import compose, docker, run

REPOSITORY = Path(__file__).parents[2]
_BUILD_S = 400.0
_UP_S = 240.0


class ComposedCluster:
    """One of them."""

    def __init__(self, secrets: Path) -> None:
        self._project = f"boreal-test-{os.getpid()}"
        self.prefix = f"bt{os.getpid()}-"
        self.secrets = secrets
        control, self._writer_port, self._reader_port, *others = free_ports(5)
        self.control = f"{HOST}:{control}"
        self.image = f"boreal:test-{os.getpid()}"
        self._environment = {
            "BOREAL_IMAGE": self.image,
            "BOREAL_PREFIX": self.prefix,
            "BOREAL_SECRETS": str(secrets),
            "BOREAL_CONTROL_PORT": str(control),
            "BOREAL_WRITER_PORT": str(self._writer_port),
            "BOREAL_READER_PORT": str(self._reader_port),
            "BOREAL_PROMETHEUS_PORT": str(others[0]),
            "BOREAL_GRAFANA_PORT": str(others[1]),
            "COMPOSE_PROJECT_NAME": self._project,
        }

    # --- the whole -------------------------------------------------------------------------------

    def make(self, target: str, *arguments: str, timeout_s: float) -> str:
        """Run a target of the Makefile on this cluster, by the tests' own Python."""
        venv = Path(sys.executable).parents[1]
        variables = [f"IMAGE={self.image}", f"SECRETS={self.secrets}", f"VENV={venv}", *arguments]
        return run(
            ["make", "-C", str(REPOSITORY), target, *variables],
            timeout_s=timeout_s,
            environment=self._environment,
        )

    def up(self) -> None:
        """`make compose-up`: returns when SQL is served."""
        self.make("compose-up", timeout_s=_BUILD_S + _UP_S)

    def down(self) -> None:
        """`make compose-down`, with everything that was stored."""
        self.make("compose-down", "ARGS=--volumes --timeout=10", timeout_s=_UP_S)

    def logs(self) -> str:
        """The last of what each container logged."""
        program = compose() or []
        file = str(REPOSITORY / "deploy" / "docker-compose.yml")
        command = [
            *program,
            "--file",
            file,
            "--project-name",
            self._project,
            "logs",
            "--no-color",
            "--tail=30",
        ]
        return run(command, timeout_s=60, check=False, environment=self._environment)

    # --- one container ---------------------------------------------------------------------------

    def kill(self, *names: str) -> None:
        """`docker kill`, at the same moment."""
        docker("kill", *(self.prefix + name for name in names))

    def start(self, *names: str) -> None:
        """`docker start`."""
        docker("start", *(self.prefix + name for name in names))

    def inspect(self, name: str) -> dict[str, Any]:
        """`docker inspect`."""
        (found,) = json.loads(docker("inspect", self.prefix + name))
        return dict(found)

    def disconnect(self, name: str, *zones: str) -> None:
        """Take a container off the networks of these zones."""
        for zone in zones:
            docker("network", "disconnect", f"{self._project}_az-{zone}", self.prefix + name)

    def connect_again(self, name: str, *zones: str) -> None:
        """Put it back, by hand: without the aliases that compose had given it."""
        for zone in zones:
            docker("network", "connect", f"{self._project}_az-{zone}", self.prefix + name)

    # --- from outside ----------------------------------------------------------------------------

    def boreal(self, *arguments: str, timeout_s: float = 60) -> str:
        """`boreal --control ...`; its standard output."""
        done = subprocess.run(
            [BOREAL, f"--tls-dir={self.secrets}/tls/boreal", "--control", self.control, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd="/",
        )
        if done.returncode != 0:
            raise AssertionError(f"boreal {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def status(self) -> dict[str, Any]:
        """`boreal status --json`."""
        found: dict[str, Any] = json.loads(self.boreal("status", "--json"))
        return found

    def node(self, name: str) -> dict[str, Any]:
        """A storage node's part of it."""
        (row,) = [row for row in self.status()["storage"] if row["name"] == name]
        return dict(row)

    def instance(self, name: str) -> dict[str, Any]:
        """An instance's part of it."""
        (row,) = [row for row in self.status()["compute"] if row["name"] == name]
        return dict(row)

    def writer(self) -> str:
        """The writer that serves, waited for."""

        def serving() -> str | None:
            found = self.status()
            rows = {row["name"]: row for row in found["compute"]}
            row = rows.get(found["writer"])
            serves = row and row["alive"] and row["role"] == "writer" and row["takes_clients"]
            return str(found["writer"]) if serves else None

        return until(serving, 60, "a writer")

    # --- SQL -------------------------------------------------------------------------------------

    @property
    def dsn(self) -> str:
        """The writer endpoint, from this machine."""
        return self._dsn(self._writer_port)

    @property
    def reader_dsn(self) -> str:
        """The reader endpoint."""
        return self._dsn(self._reader_port)

    def _dsn(self, port: int) -> str:
        password = (self.secrets / "master-password").read_text().strip()
        return f"postgresql://boreal:{password}@{HOST}:{port}/postgres"

    def query(self, statement: str, dsn: str | None = None) -> list[tuple[Any, ...]]:
        """Run one statement, waiting for somebody who answers."""
        return until(lambda: self._attempt(statement, dsn or self.dsn), 90, statement)

    @staticmethod
    def _attempt(statement: str, dsn: str) -> list[tuple[Any, ...]] | None:
        try:
            with psycopg.connect(dsn, autocommit=True, connect_timeout=5) as connection:
                cursor = connection.execute(statement.encode())
                return cursor.fetchall() if cursor.description else []
        except psycopg.OperationalError:
            return None

    def pgbench(self, *arguments: str) -> subprocess.Popen[str]:
        """Start pgbench at the writer endpoint."""
        return subprocess.Popen(
            [str(psql_program().with_name("pgbench")), *arguments, self.dsn],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@contextmanager
def composed_cluster() -> Iterator[ComposedCluster]:
    """A running one; gone without a trace afterwards, its image and its layers included."""
    before = nameless_images()
    with tempfile.TemporaryDirectory(prefix="boreal-secrets-") as secrets:
        cluster = ComposedCluster(Path(secrets))
        try:
            cluster.up()
            yield cluster
        finally:
            print(cluster.logs())
            cluster.down()
            docker("rmi", cluster.image, check=False)
            for image in nameless_images() - before:  # the stage in which it was built
                docker("rmi", image, check=False)


def nameless_images() -> set[str]:
    """Those no tag leads to: stages of builds."""
    return set(docker("images", "--quiet", "--filter=dangling=true").split())
