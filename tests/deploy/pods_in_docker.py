"""Runs pods in Docker as the kubelet would: command line, variables, user, mounts, limits, names.

Each Service is an alias on the network, as its name in DNS would be; ports of the endpoints are
published to this machine. Secrets are what the kubelet makes of them: root's files, with the pod's
group. Takes root.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from boreal.cluster import HOST
from tests.cluster.local import until
from tests.deploy.composed import REPOSITORY, nameless_images
from tests.deploy.docker_engine import docker, run, succeeds
from tests.deploy.manifests import DEPLOY, Manifests, Object, Pod, render

_BUILD_S = 400.0
_READY_S = 240.0


class PodsInDocker:
    """All pods of some manifests; everything made for them has `name` in its own."""

    def __init__(self, manifests: Manifests, name: str, folder: Path) -> None:
        """`folder` takes the files of Secrets."""
        self.manifests = manifests
        self._name = name
        self._folder = folder

    def container(self, pod: Pod) -> str:
        return f"{self._name}-{pod.name}"

    # --- all of them -----------------------------------------------------------------------------

    def start(self) -> None:
        """Start all, and wait until all are ready."""
        docker("network", "create", self._name)
        for pod in self.manifests.pods:
            command = [*self._options(pod), pod.container["image"], *pod.arguments]
            docker("run", "--detach", *command)
        self.wait_ready(*self.manifests.pods)

    def wait_ready(self, *pods: Pod) -> None:
        """By their readiness probes."""
        for pod in pods:
            until(lambda: self.succeeds(pod, "readinessProbe"), _READY_S, pod.name)  # noqa: B023

    def logs(self) -> str:
        """The last of what each said."""
        parts = [(pod.name, self._log(pod)) for pod in self.manifests.pods]
        return "\n".join(f"--- {name}\n{log}" for name, log in parts)

    def remove(self) -> None:
        """Leave nothing."""
        docker("rm", "--force", "--volumes", *map(self.container, self.manifests.pods), check=False)
        docker("network", "rm", self._name, check=False)

    # --- one of them -----------------------------------------------------------------------------

    def succeeds(self, pod: Pod, probe: str) -> bool:
        """Run a probe's command inside."""
        return succeeds(
            "docker", "exec", self.container(pod), *pod.probes[probe]["exec"]["command"]
        )

    def run(self, pod: Pod, *command: str, check: bool = True) -> str:
        """Run something inside; what it printed."""
        return docker("exec", self.container(pod), *command, check=check).strip()

    def kill(self, pod: Pod) -> None:
        """SIGKILL."""
        docker("kill", self.container(pod))

    def restart(self, pod: Pod) -> None:
        """Its container is run again with the pod's volumes, as after it ended by itself."""
        docker("start", self.container(pod))

    def port(self, pod: Pod, name: str) -> int:
        """Where one of its ports is found on this machine."""
        published = docker("port", self.container(pod), f"{pod.ports[name]}/tcp")
        return int(published.splitlines()[0].rpartition(":")[2])

    def _log(self, pod: Pod) -> str:
        return docker("logs", "--tail=30", self.container(pod), check=False)

    # --- how it is run ---------------------------------------------------------------------------

    def _options(self, pod: Pod) -> Iterator[str]:
        inside, outside = pod.container["securityContext"], pod.spec["securityContext"]
        yield f"--name={self.container(pod)}"
        yield f"--hostname={pod.name}"
        yield f"--network={self._name}"
        yield from (f"--network-alias={alias}" for alias in self._aliases(pod))
        yield f"--user={outside['runAsUser']}:{outside['runAsGroup']}"
        yield f"--read-only={'true' if inside['readOnlyRootFilesystem'] else 'false'}"
        if not inside["allowPrivilegeEscalation"]:
            yield "--security-opt=no-new-privileges"
        yield from (f"--cap-drop={capability}" for capability in inside["capabilities"]["drop"])
        yield f"--memory={pod.container['resources']['limits']['memory'].removesuffix('i')}"
        yield from (f"--env={name}={value}" for name, value in pod.environment.items())
        for name in {"writer", "reader"} & set(pod.ports):
            yield f"--publish={HOST}::{pod.ports[name]}"
        yield from self._mounts(pod)

    def _aliases(self, pod: Pod) -> Iterator[str]:
        for name, service in self.manifests.of_kind("Service").items():
            if pod in self.manifests.behind(name):
                headless = service["spec"].get("clusterIP") == "None"
                yield f"{pod.name}.{name}" if headless else name

    def _mounts(self, pod: Pod) -> Iterator[str]:
        volumes = {each["name"]: each for each in pod.spec["volumes"]}
        for mount in pod.container["volumeMounts"]:
            volume, path = volumes.get(mount["name"], {}), mount["mountPath"]
            if "secret" in volume:
                folder = self._secret(volume["secret"], pod.spec["securityContext"]["fsGroup"])
                yield f"--volume={folder / mount.get('subPath', '')}:{path}:ro"
            elif mount["name"] == "tmp":
                yield f"--tmpfs={path}:mode=1777,size=64m"
            else:  # of disk, and removed with the container
                yield f"--volume={path}"

    def _secret(self, secret: Object, group: int) -> Path:
        folder = self._folder / str(secret["secretName"])
        if not folder.exists():
            folder.mkdir(mode=0o755)
            data = self.manifests.of_kind("Secret")[secret["secretName"]]["data"]
            for name, content in data.items():
                path = folder / name
                path.write_bytes(base64.b64decode(content))
                os.chown(path, 0, group)
                path.chmod(secret["defaultMode"])
        return folder


@contextmanager
def pods_in_docker(scratch: Path) -> Iterator[PodsInDocker]:
    """The pods of the overlay for kind, of an image built for them; afterwards nothing of them.

    The overlay's copy is in `scratch`/k8s/overlays/kind, with its secrets/.
    """
    name = f"boreal-pods-{os.getpid()}"
    overlay = scratch / "k8s" / "overlays" / "kind"
    shutil.copytree(DEPLOY / "k8s", scratch / "k8s", ignore=shutil.ignore_patterns("secrets"))
    make_secrets(overlay / "secrets")
    with (overlay / "kustomization.yaml").open("a") as kustomization:
        kustomization.write(f"images:\n  - name: boreal\n    newTag: {name}\n")
    mounted = scratch / "mounted"
    mounted.mkdir()
    scratch.chmod(0o755)
    pods = PodsInDocker(render(overlay), name, mounted)
    before = nameless_images()
    try:
        run(["make", "-C", str(REPOSITORY), "image", f"IMAGE=boreal:{name}"], timeout_s=_BUILD_S)
        pods.start()
        yield pods
    finally:
        print(pods.logs())
        pods.remove()
        docker("rmi", f"boreal:{name}", check=False)
        for image in nameless_images() - before:
            docker("rmi", image, check=False)


def make_secrets(directory: Path, *names: str) -> None:
    """Run deploy/k8s/secrets.sh with the tests' own `boreal`."""
    program = Path(sys.executable).with_name("boreal")
    subprocess.run(
        [DEPLOY / "k8s" / "secrets.sh", directory, *names],
        env={**os.environ, "BOREAL": str(program)},
        check=True,
        timeout=60,
    )
