"""Goal: a Kubernetes cluster would take deploy/k8s as it is, and each of our processes would take
the command line it is given there.

Method: the manifests are rendered by the real `kubectl kustomize` and checked against Kubernetes'
own schemas, strictly. What a schema does not say is checked here: that names lead to something,
that ports agree from the command line to the Service, that pods are as closed as they can be.
Command lines are parsed by the real commands, with the environment of the pod.
"""

from __future__ import annotations

import copy
import importlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from boreal.command.main import main as boreal
from tests.deploy.manifests import (
    CERTIFICATE_FILES,
    DEPLOY,
    NAMESPACE,
    SECRETS,
    Manifests,
    Pod,
    matches,
    render,
)
from tests.deploy.pods_in_docker import make_secrets

VERSIONS = ("1.35", "1.37")
"""The oldest Kubernetes we run on, and the newest whose schemas we have."""
CLUSTER_WIDE = {"Namespace"}
STORAGE_NAMES = [f"sn-{number}" for number in range(1, 7)]
INSTANCE_NAMES = [f"db-{number}" for number in range(1, 4)]


# --- what Kubernetes asks ------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(manifests: Manifests, version: str) -> None:
    for each in manifests.objects:
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_base_is_valid_by_itself(version: str) -> None:
    for each in render(DEPLOY / "k8s" / "base").objects:
        kubernetes_validate.validate(each, version, strict=True)


def test_the_validator_knows_a_mistake(manifests: Manifests) -> None:
    wrong = copy.deepcopy(manifests.of_kind("StatefulSet")["sn"])
    wrong["spec"]["template"]["spec"]["topologySpreadConstraint"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="topologySpreadConstraint"):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def test_everything_is_in_one_namespace(manifests: Manifests) -> None:
    assert list(manifests.of_kind("Namespace")) == [NAMESPACE]
    for each in manifests.objects:
        if each["kind"] not in CLUSTER_WIDE:
            assert each["metadata"]["namespace"] == NAMESPACE


# --- names lead to something ---------------------------------------------------------------------


def test_the_processes_have_their_names(manifests: Manifests) -> None:
    names = [pod.name for pod in manifests.pods]
    assert [name for name in names if name.startswith("sn-")] == STORAGE_NAMES
    assert [name for name in names if name.startswith("db-")] == INSTANCE_NAMES


def test_workloads_select_their_own_pods_and_nobody_elses(manifests: Manifests) -> None:
    for workload in manifests.workloads:
        selector = workload["spec"]["selector"]
        selected = [pod for pod in manifests.pods if matches(selector, pod.labels)]
        assert selected == [pod for pod in manifests.pods if pod.workload is workload]


def test_every_service_leads_to_ports_of_pods(manifests: Manifests) -> None:
    for name, service in manifests.of_kind("Service").items():
        pods = manifests.behind(name)
        assert len({pod.component for pod in pods}) == 1, name
        for port in service["spec"]["ports"]:
            assert all(port["targetPort"] in pod.ports for pod in pods), (name, port)


def test_stateful_pods_have_names_others_can_resolve(manifests: Manifests) -> None:
    services = manifests.of_kind("Service")
    for workload in manifests.of_kind("StatefulSet").values():
        governing = workload["spec"]["serviceName"]
        assert all(pod.workload is workload for pod in manifests.behind(governing))
        # Others reach a node that is not ready, or none would ever be.
        assert services[governing]["spec"]["publishNotReadyAddresses"] is True
    for pod in manifests.pods:
        for word in pod.arguments:
            if word.startswith("--advertise="):
                governing = pod.workload["spec"]["serviceName"]
                assert word == f"--advertise={pod.name}.{governing}"
                assert services[governing]["spec"]["clusterIP"] == "None"


def test_everybody_finds_the_control_plane(manifests: Manifests) -> None:
    (port,) = manifests.of_kind("Service")["control"]["spec"]["ports"]
    for pod in manifests.pods:
        named = [word for word in pod.arguments if word.startswith("--control=")]
        expected = [] if pod.component == "control" else [f"--control=control:{port['port']}"]
        assert named == expected


def test_volumes_are_there_and_secrets_hold_what_is_read(manifests: Manifests) -> None:
    secrets = manifests.of_kind("Secret")
    for pod in manifests.pods:
        volumes = {each["name"]: each for each in pod.spec["volumes"]}
        claims = pod.workload["spec"].get("volumeClaimTemplates", [])
        available = [*volumes, *(claim["metadata"]["name"] for claim in claims)]
        mounts = {each["name"]: each for each in pod.container["volumeMounts"]}
        assert sorted(mounts) == sorted(available), pod.name
        for name, volume in volumes.items():
            if "secret" in volume:
                held = secrets[volume["secret"]["secretName"]]["data"]
                part = mounts[name].get("subPath")
                assert (part in held) if part else (set(held) == set(CERTIFICATE_FILES))
        assert mounts["tls"]["mountPath"] == pod.environment["BOREAL_TLS_DIR"]


def test_what_must_last_is_on_a_claim_that_lasts(manifests: Manifests) -> None:
    for component in ("control", "storage"):
        workload = manifests.one(component).workload
        assert [
            claim["metadata"]["name"] for claim in workload["spec"]["volumeClaimTemplates"]
        ] == ["data"]
        policy = workload["spec"]["persistentVolumeClaimRetentionPolicy"]
        assert set(policy.values()) == {"Retain"}
    assert "volumeClaimTemplates" not in manifests.one("compute").workload["spec"]


# --- our processes take it -----------------------------------------------------------------------


def _parsed(pod: Pod, here: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of the pod's process as the process itself reads them; paths lie below `here`."""
    for name in [name for name in os.environ if name.startswith("BOREAL_")]:
        monkeypatch.delenv(name)
    for name, value in pod.environment.items():
        monkeypatch.setenv(name, _below(here, value))
    module, *words = pod.arguments
    command = importlib.import_module(f"{module}.__main__").main
    assert isinstance(command, click.Command)
    context = command.make_context(module, [_below(here, word) for word in words])
    return dict(context.params)


def _below(here: Path, text: str) -> str:
    for inside in ("/etc/boreal", "/var/lib/boreal"):
        text = text.replace(inside, f"{here}{inside}")
    return text


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """A root with what is mounted there."""
    etc = tmp_path / "etc" / "boreal"
    (etc / "tls").mkdir(parents=True)
    (etc / "master-password").write_text("a password\n")
    return tmp_path


def test_processes_take_their_command_lines(
    manifests: Manifests, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pod in manifests.pods:
        options = _parsed(pod, mounted, monkeypatch)
        assert options["host"] == "0.0.0.0"
        assert options["tls_dir"] == mounted / "etc/boreal/tls"
        # Every port it listens on is one of the container's, and the other way round.
        ports = {value for name, value in options.items() if name.endswith("port") and value}
        assert ports == set(pod.ports.values()), pod.name
        if pod.component in {"storage", "compute"}:
            assert options["name"] == pod.name
            assert options["advertise"].startswith(f"{pod.name}.")
        if pod.component == "storage":
            assert options["zone"] == pod.zone
        if pod.component == "compute":
            assert options["no_handover"]


def test_a_storage_node_without_a_zone_refuses_to_start(
    manifests: Manifests, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Kubernetes that does not copy the label: the variable is there, and empty."""
    pod = manifests.one("storage")
    nowhere = Pod(name=pod.name, workload=pod.workload)
    assert nowhere.environment["BOREAL_ZONE"] == ""
    with pytest.raises(click.MissingParameter, match="zone"):
        _parsed(nowhere, mounted, monkeypatch)


def test_probes_ask_the_process_and_liveness_never_asks_for_readiness(
    manifests: Manifests, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"control": "control", "storage": "log", "compute": "agent", "endpoints": "health"}
    for pod in manifests.pods:
        assert {"readinessProbe", "livenessProbe"} <= set(pod.probes)
        for kind, probe in pod.probes.items():
            options = _health_options(pod, probe["exec"]["command"], mounted, monkeypatch)
            assert options["address"] == f"127.0.0.1:{pod.ports[asked[pod.component]]}"
            assert options["ready"] is (kind == "readinessProbe"), (pod.name, kind)


def _health_options(
    pod: Pod, command: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    for name, value in pod.environment.items():
        monkeypatch.setenv(name, _below(here, value))
    program, verb, *words = command
    assert (program, verb) == ("boreal", "health")
    with boreal.make_context(program, [verb, *words]) as above:
        _name, found, rest = boreal.resolve_command(above, [verb, *words])
        assert found is not None
        assert above.params["tls_dir"] == here / "etc/boreal/tls"
        return dict(found.make_context(verb, rest, parent=above).params)


def test_probes_have_patience(manifests: Manifests) -> None:
    """A busy machine, or a node that reads its disk, is not killed for it."""
    for pod in manifests.pods:
        liveness = pod.probes["livenessProbe"]
        assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 300
        for probe in pod.probes.values():
            assert probe["timeoutSeconds"] >= 10
    startup = manifests.one("storage").probes["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800


# --- redundancy ----------------------------------------------------------------------------------


def test_two_storage_nodes_a_zone_and_one_disruption_at_a_time(manifests: Manifests) -> None:
    pod = manifests.one("storage")
    zones, _hosts = pod.spec["topologySpreadConstraints"]
    assert zones["topologyKey"] == "topology.kubernetes.io/zone"
    assert (zones["maxSkew"], zones["whenUnsatisfiable"]) == (1, "DoNotSchedule")
    assert matches(zones["labelSelector"], pod.labels)
    assert pod.workload["spec"]["podManagementPolicy"] == "Parallel"

    budgets = manifests.of_kind("PodDisruptionBudget")
    for component in ("storage", "compute", "endpoints"):
        spec = budgets[component]["spec"]
        assert spec["maxUnavailable"] == 1
        selected = {
            each.component for each in manifests.pods if matches(spec["selector"], each.labels)
        }
        assert selected == {component}


# --- closed --------------------------------------------------------------------------------------


def test_pods_are_as_closed_as_the_restricted_standard_asks(manifests: Manifests) -> None:
    namespace = manifests.of_kind("Namespace")[NAMESPACE]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in manifests.pods:
        inside, outside = pod.container["securityContext"], pod.spec["securityContext"]
        assert outside["runAsNonRoot"]
        assert outside["runAsUser"] == outside["fsGroup"] == 10001
        assert outside["seccompProfile"] == {"type": "RuntimeDefault"}
        assert inside["allowPrivilegeEscalation"] is False
        assert inside["readOnlyRootFilesystem"] is True
        assert inside["capabilities"] == {"drop": ["ALL"]}
        assert pod.spec["automountServiceAccountToken"] is False
        # Service boreal-writer would make a variable BOREAL_WRITER_PORT: an option of ours.
        assert pod.spec["enableServiceLinks"] is False


def test_keys_are_readable_for_us_and_acceptable_to_postgresql(manifests: Manifests) -> None:
    """Root's, and our group reads them (fsGroup): PostgreSQL takes 0640, if they are root's."""
    for pod in manifests.pods:
        (tls,) = (each for each in pod.spec["volumes"] if each["name"] == "tls")
        assert tls["secret"]["defaultMode"] == 0o440


def test_everybody_has_memory_and_nobody_is_held_back(manifests: Manifests) -> None:
    for pod in manifests.pods:
        resources = pod.container["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"])
        assert set(resources["limits"]) == {"memory"}


# --- kind ----------------------------------------------------------------------------------------


def test_kinds_machines_are_in_three_zones_and_lead_to_the_endpoints(manifests: Manifests) -> None:
    cluster = yaml.safe_load((DEPLOY / "kind" / "cluster.yaml").read_text())
    workers = [node for node in cluster["nodes"] if node["role"] == "worker"]
    assert [node["labels"]["topology.kubernetes.io/zone"] for node in workers] == ["a", "b", "c"]
    (leader,) = (node for node in cluster["nodes"] if node["role"] == "control-plane")
    mapped = {each["containerPort"] for each in leader["extraPortMappings"]}
    services = manifests.of_kind("Service")
    names = ("boreal-writer", "boreal-reader")
    assert mapped == {services[name]["spec"]["ports"][0]["nodePort"] for name in names}
    assert {each["listenAddress"] for each in leader["extraPortMappings"]} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("script", "installed", "missing"),
    [
        ("kind/up.sh", [], "docker is not installed"),
        ("kind/up.sh", ["docker"], "kind is not installed"),
        ("kind/up.sh", ["docker", "kind"], "kubectl is not installed"),
        ("kind/down.sh", [], "kind is not installed"),
    ],
)
def test_scripts_say_what_is_missing(
    tmp_path: Path, script: str, installed: list[str], missing: str
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "env"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    for name in installed:
        (tools / name).symlink_to("/usr/bin/true")
    done = subprocess.run(
        [DEPLOY / script],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert missing in done.stderr
    assert "see http" in done.stderr


def test_secrets_are_what_the_overlay_takes(tmp_path: Path, kind_overlay: Path) -> None:
    copied = tmp_path / "k8s"
    shutil.copytree(kind_overlay.parents[1], copied, ignore=shutil.ignore_patterns("secrets"))
    overlay = copied / "overlays" / "kind"
    made = overlay / "secrets"

    def make() -> dict[Path, bytes]:
        make_secrets(made, "db.example.org")
        return {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}

    first = make()
    for path in first:
        if path.suffix == ".key" or path.name == "master-password":
            assert path.stat().st_mode & 0o077 == 0
    assert make() == first
    rendered = render(overlay)
    assert len(rendered.of_kind("Secret")) == len(SECRETS) + 1
