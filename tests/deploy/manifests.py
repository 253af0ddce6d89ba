"""What `kubectl` makes of deploy/k8s, and how to look things up in it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
NAMESPACE = "boreal"
COMPONENT = "app.kubernetes.io/component"
SECRETS = ("control", "storage", "compute", "endpoints")
"""For whom an overlay has a certificate."""
ZONES = "abc"
CERTIFICATE_FILES = ("ca.crt", "tls.crt", "tls.key")

_LEAST_MINOR = 27
"""Of kubectl: with kustomize 5, which knows what we write."""
_LIMIT_S = 60
_VARIABLE = re.compile(r"\$\((\w+)\)")

Object = dict[str, Any]


def kubectl() -> str:
    """The program; skips the test, saying why, where there is none or too old a one."""
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed: nothing renders deploy/k8s")
    version = _run(program, "version", "--client", "--output=yaml")
    minor = int(re.sub(r"\D", "", yaml.safe_load(version)["clientVersion"]["minor"]))
    if minor < _LEAST_MINOR:
        pytest.skip(f"kubectl 1.{minor} is too old to render deploy/k8s: 1.{_LEAST_MINOR} or later")
    return program


def render(folder: Path) -> Manifests:
    """Build a kustomization with the real kustomize. Warnings are errors."""
    output = _run(kubectl(), "kustomize", str(folder))
    return Manifests([each for each in yaml.safe_load_all(output) if each])


def _run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_LIMIT_S, check=False, cwd="/"
    )
    if done.returncode != 0 or done.stderr.strip():
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def matches(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects; an absent one selects nothing, an empty one everything."""
    if selector is None:
        return False
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions), "only In is understood here"
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """One of the pods a workload is made of, as it is started."""

    name: str
    workload: Object
    zone: str | None = None

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = dict(self.workload["spec"]["template"]["metadata"]["labels"])
        # As Kubernetes does when a machine is found for it.
        return labels | ({"topology.kubernetes.io/zone": self.zone} if self.zone else {})

    @property
    def component(self) -> str:
        return self.labels[COMPONENT]

    @property
    def spec(self) -> Object:
        spec: Object = self.workload["spec"]["template"]["spec"]
        return spec

    @property
    def container(self) -> Object:
        (container,) = self.spec["containers"]
        found: Object = container
        return found

    @property
    def ports(self) -> dict[str, int]:
        """Number by name."""
        return {each["name"]: each["containerPort"] for each in self.container["ports"]}

    @property
    def environment(self) -> dict[str, str]:
        """The variables its container is given."""
        return {each["name"]: self._value(each) for each in self.container["env"]}

    def _value(self, variable: Mapping[str, Any]) -> str:
        if "value" in variable:
            return str(variable["value"])
        path = variable["valueFrom"]["fieldRef"]["fieldPath"]
        if path == "metadata.name":
            return self.name
        label = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
        assert label is not None, f"{path} is not understood here"
        return self.labels.get(label[1], "")

    @property
    def arguments(self) -> list[str]:
        """Its command line, `$(NAME)` replaced as the kubelet does."""
        known = self.environment
        return [_VARIABLE.sub(lambda m: known[m[1]], word) for word in self.container["args"]]

    @property
    def probes(self) -> dict[str, Object]:
        kinds = ("startupProbe", "readinessProbe", "livenessProbe")
        return {kind: self.container[kind] for kind in kinds if kind in self.container}


class Manifests:
    """All objects of one rendering."""

    def __init__(self, objects: list[Object]) -> None:
        self.objects = objects

    def of_kind(self, kind: str) -> dict[str, Object]:
        """Those objects by name."""
        return {each["metadata"]["name"]: each for each in self.objects if each["kind"] == kind}

    @cached_property
    def workloads(self) -> list[Object]:
        return [each for each in self.objects if each["kind"] in {"StatefulSet", "Deployment"}]

    @cached_property
    def pods(self) -> list[Pod]:
        """Every pod there will be, in a zone that the scheduler could choose."""
        return [pod for workload in self.workloads for pod in _pods(workload)]

    def one(self, component: str) -> Pod:
        """Any pod of a component."""
        return next(pod for pod in self.pods if pod.component == component)

    def behind(self, service: str) -> list[Pod]:
        """The pods a Service leads to."""
        selector = {"matchLabels": self.of_kind("Service")[service]["spec"]["selector"]}
        return [pod for pod in self.pods if matches(selector, pod.labels)]


def _pods(workload: Object) -> Iterator[Pod]:
    name, spec = workload["metadata"]["name"], workload["spec"]
    start = spec.get("ordinals", {}).get("start", 0)
    for number in range(spec["replicas"]):
        yield Pod(name=f"{name}-{start + number}", workload=workload, zone=ZONES[number % 3])
