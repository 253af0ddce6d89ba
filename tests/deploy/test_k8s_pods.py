"""Goal: every pod of deploy/k8s works as closed as its manifest makes it: no root, no writable root
file system, no capabilities, keys that only its group reads; and together they are a database.

Method: where there is no Kubernetes, Docker does for each pod what the kubelet would: its command
line, variables, mounts, limits and names, as rendered. Its probes are run inside it. Services are
network aliases; scheduler, claims and NetworkPolicies have no part in this. Needs root (Secrets are
root's files) and the image boreal:dev (`make image`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.deploy.manifests import DEPLOY, Manifests, Object, Pod, render

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

IMAGE = "boreal:dev"
_READY_LIMIT_S = 240.0
_SQL_LIMIT_S = 60.0


def _docker(*arguments: str, check: bool = True, timeout_s: float = 120) -> str:
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if check and done.returncode != 0:
        raise AssertionError(f"docker {' '.join(arguments)}: {done.stderr}")
    return done.stdout.strip()


@pytest.fixture(scope="module")
def image() -> str:
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    if os.geteuid() != 0:
        pytest.skip("only root can make files as the kubelet makes those of Secrets")
    done = subprocess.run(
        ["docker", "image", "inspect", IMAGE], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no Docker engine with an image {IMAGE} (`make image`): {done.stderr.strip()}")
    return IMAGE


class Machine:
    """Runs pods in Docker; everything it makes has its prefix."""

    def __init__(self, manifests: Manifests, folder: Path) -> None:
        self.manifests = manifests
        self._folder = folder
        self._prefix = f"boreal-pods-{os.getpid()}"
        self._started: list[str] = []
        _docker("network", "create", self._prefix)

    def container(self, pod: Pod) -> str:
        return f"{self._prefix}-{pod.name}"

    def start(self, pod: Pod) -> None:
        self._started.append(self.container(pod))
        _docker("run", "--detach", *self._options(pod), pod.container["image"], *pod.arguments)

    def _options(self, pod: Pod) -> Iterator[str]:
        inside, outside = pod.container["securityContext"], pod.spec["securityContext"]
        yield from ("--name", self.container(pod), "--hostname", pod.name)
        yield from ("--network", self._prefix)
        for alias in self._aliases(pod):
            yield from ("--network-alias", alias)
        yield from ("--user", f"{outside['runAsUser']}:{outside['runAsGroup']}")
        if inside["readOnlyRootFilesystem"]:
            yield "--read-only"
        if not inside["allowPrivilegeEscalation"]:
            yield from ("--security-opt", "no-new-privileges")
        for capability in inside["capabilities"]["drop"]:
            yield from ("--cap-drop", capability)
        yield from ("--memory", pod.container["resources"]["limits"]["memory"].removesuffix("i"))
        for name, value in pod.environment.items():
            yield from ("--env", f"{name}={value}")
        for port in ("writer", "reader"):
            if port in pod.ports:
                yield from ("--publish", f"127.0.0.1::{pod.ports[port]}")
        yield from self._mounts(pod, outside["fsGroup"])

    def _aliases(self, pod: Pod) -> Iterator[str]:
        for name, service in self.manifests.of_kind("Service").items():
            if pod in self.manifests.behind(name):
                headless = service["spec"].get("clusterIP") == "None"
                yield f"{pod.name}.{name}" if headless else name

    def _mounts(self, pod: Pod, group: int) -> Iterator[str]:
        volumes = {each["name"]: each for each in pod.spec["volumes"]}
        for mount in pod.container["volumeMounts"]:
            volume = volumes.get(mount["name"], {})
            path = mount["mountPath"]
            if "secret" in volume:
                source = self._secret(volume["secret"], group) / mount.get("subPath", "")
                yield from ("--volume", f"{source}:{path}:ro")
            elif mount["name"] == "tmp":
                yield from ("--tmpfs", f"{path}:mode=1777,size=64m")
            else:  # removed with its container
                yield from ("--volume", path)

    def _secret(self, secret: Object, group: int) -> Path:
        folder = self._folder / str(secret["secretName"])
        folder.mkdir(mode=0o755, exist_ok=True)
        data = self.manifests.of_kind("Secret")[secret["secretName"]]["data"]
        for name, content in data.items():
            path = folder / name
            path.write_bytes(base64.b64decode(content))
            os.chown(path, 0, group)
            path.chmod(secret["defaultMode"])
        return folder

    def succeeds(self, pod: Pod, probe: str) -> bool:
        command = pod.probes[probe]["exec"]["command"]
        done = subprocess.run(
            ["docker", "exec", self.container(pod), *command],
            capture_output=True,
            timeout=60,
            check=False,
        )
        return done.returncode == 0

    def wait_ready(self, *pods: Pod) -> None:
        deadline = time.monotonic() + _READY_LIMIT_S
        for pod in pods:
            while not self.succeeds(pod, "readinessProbe"):
                if time.monotonic() > deadline:
                    raise AssertionError(f"{pod.name} does not get ready:\n{self.log(pod)}")
                time.sleep(0.2)

    def log(self, pod: Pod) -> str:
        done = subprocess.run(
            ["docker", "logs", "--tail", "30", self.container(pod)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.stdout

    def run(self, pod: Pod, *command: str) -> str:
        return _docker("exec", self.container(pod), *command)

    def kill(self, pod: Pod) -> None:
        _docker("kill", self.container(pod))

    def restart(self, pod: Pod) -> None:
        """As the kubelet does with a container that ended: another one, the pod's volumes kept."""
        _docker("start", self.container(pod))

    def port(self, pod: Pod, name: str) -> int:
        published = _docker("port", self.container(pod), f"{pod.ports[name]}/tcp")
        return int(published.splitlines()[0].rpartition(":")[2])

    def remove(self) -> None:
        if self._started:
            _docker("rm", "--force", "--volumes", *self._started, check=False)
        _docker("network", "rm", self._prefix, check=False)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory, image: str) -> Path:
    """An overlay's secrets/, as deploy/k8s/secrets.sh makes them; next to it, the overlay."""
    copied = tmp_path_factory.mktemp("pods") / "k8s"
    shutil.copytree(DEPLOY / "k8s", copied, ignore=shutil.ignore_patterns("secrets"))
    made = copied / "overlays" / "kind" / "secrets"
    program = Path(sys.executable).with_name("boreal")
    environment = {**os.environ, "BOREAL": str(program)}
    subprocess.run([DEPLOY / "k8s" / "secrets.sh", made], env=environment, check=True, timeout=60)
    return made


@pytest.fixture(scope="module")
def machine(secrets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine(render(secrets.parent), tmp_path_factory.mktemp("mounted"))
    try:
        for pod in machine.manifests.pods:
            machine.start(pod)
        machine.wait_ready(*machine.manifests.pods)
        yield machine
    finally:
        machine.remove()


@contextlib.contextmanager
def _session(machine: Machine, endpoint: str, secrets: Path) -> Iterator[psycopg.Connection]:
    """One that insists on TLS and on the certificate's name."""
    port = machine.port(machine.manifests.one("endpoints"), endpoint)
    with psycopg.connect(
        host="localhost",
        port=port,
        dbname="postgres",
        user="boreal",
        password=(secrets / "master-password").read_text().strip(),
        sslmode="verify-full",
        sslrootcert=str(secrets / "ca.crt"),
        connect_timeout=40,
        autocommit=True,
    ) as session:
        yield session


def _writer(machine: Machine) -> Pod:
    control = machine.manifests.one("control")
    said = machine.run(control, "boreal", "--control", "127.0.0.1:7000", "status", "--json")
    (name,) = json.loads(said)["endpoints"]["writer"]["instances"]
    return next(pod for pod in machine.manifests.pods if pod.name == name)


def test_pods_answer_all_their_probes(machine: Machine) -> None:
    for pod in machine.manifests.pods:
        assert all(machine.succeeds(pod, probe) for probe in pod.probes), pod.name


def test_nothing_outside_the_volumes_can_be_written(machine: Machine) -> None:
    for pod in machine.manifests.pods:
        who = machine.run(pod, "id", "-u")
        assert who == "10001"
        with pytest.raises(AssertionError, match="Read-only file system"):
            machine.run(pod, "touch", "/opt/boreal/touched")


def test_commits_survive_their_writer(machine: Machine, secrets: Path) -> None:
    with _session(machine, "writer", secrets) as session:
        session.execute("CREATE TABLE kept (number int)")
        session.execute("INSERT INTO kept SELECT generate_series(1, 1000)")
    first = _writer(machine)
    machine.kill(first)
    with _session(machine, "writer", secrets) as session:  # waits for the next one
        session.execute("INSERT INTO kept VALUES (1001)")
        assert session.execute("SELECT count(*) FROM kept").fetchone() == (1001,)
    assert _writer(machine).name != first.name
    machine.restart(first)
    machine.wait_ready(first)

    deadline = time.monotonic() + _SQL_LIMIT_S
    while True:  # readers are a moment behind
        with _session(machine, "reader", secrets) as session:
            assert session.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
            if session.execute("SELECT count(*) FROM kept").fetchone() == (1001,):
                return
        assert time.monotonic() < deadline
        time.sleep(0.1)
