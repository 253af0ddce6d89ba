"""Goal: the NetworkPolicies of deploy/k8s let every process do its work, and nobody do more.

Method: the flows that exist, by component and port, are put to the rendered policies by the rules
of the NetworkPolicy API: what no policy selects is free; what one selects needs one that allows it,
at both ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import pytest

from tests.deploy.manifests import NAMESPACE, Manifests, matches

DNS = 53
METRICS = {9101, 9102}
CLIENTS = {5432, 5433}

FLOWS = {
    ("storage", "control", 7000),
    ("compute", "control", 7000),
    ("endpoints", "control", 7000),
    ("compute", "storage", 7001),  # fence, adopt, log, bundles
    ("compute", "storage", 7002),  # appends
    ("compute", "storage", 7003),  # pages by gRPC: import, digests
    ("compute", "storage", 7004),  # pages
    ("storage", "storage", 7001),  # catch-up from peers
    ("compute", "compute", 7101),  # readers follow the writer
    ("endpoints", "compute", 5432),
}
"""Who calls whom, and where. All of it, within the namespace."""

Party = tuple[Mapping[str, str], Mapping[str, str]]
"""The labels of a pod, and of its namespace."""


def _namespace(name: str) -> dict[str, str]:
    return {"kubernetes.io/metadata.name": name}


STRANGER: Party = ({"app": "shop"}, _namespace("shop"))
NEIGHBOUR: Party = ({"app": "shop"}, _namespace(NAMESPACE))
PROMETHEUS: Party = ({"app": "prometheus"}, _namespace("monitoring"))
RESOLVER: Party = ({"k8s-app": "kube-dns"}, _namespace("kube-system"))


class Network:
    """What the policies allow."""

    def __init__(self, manifests: Manifests) -> None:
        self._policies = [each["spec"] for each in manifests.of_kind("NetworkPolicy").values()]
        self._parties: dict[str, Party] = {
            component: (manifests.one(component).labels, _namespace(NAMESPACE))
            for component in ("control", "storage", "compute", "endpoints")
        }

    def party(self, component: str) -> Party:
        return self._parties[component]

    def allows(self, source: Party, target: Party, port: int) -> bool:
        return self._allows("Egress", source, target, port) and self._allows(
            "Ingress", target, source, port
        )

    def _allows(self, way: str, of: Party, other: Party, port: int) -> bool:
        labels, namespace = of
        if namespace != _namespace(NAMESPACE):
            return True  # another namespace's affair
        selecting = [
            policy
            for policy in self._policies
            if way in policy["policyTypes"] and matches(policy["podSelector"], labels)
        ]
        return not selecting or any(
            _rule_allows(rule, peers, other, port)
            for policy in selecting
            for rule, peers in _rules(policy, way)
        )


def _rules(policy: Mapping[str, Any], way: str) -> Iterator[tuple[Mapping[str, Any], Any]]:
    for rule in policy.get(way.lower(), []):
        yield rule, rule.get("from" if way == "Ingress" else "to")


def _rule_allows(rule: Mapping[str, Any], peers: Any, other: Party, port: int) -> bool:
    ports = rule.get("ports")
    if ports is not None and port not in {each["port"] for each in ports}:
        return False
    return peers is None or any(_is(peer, other) for peer in peers)


def _is(peer: Mapping[str, Any], other: Party) -> bool:
    assert set(peer) <= {"podSelector", "namespaceSelector"}, "no others are understood here"
    labels, namespace = other
    near = namespace == _namespace(NAMESPACE)
    home = matches(peer["namespaceSelector"], namespace) if "namespaceSelector" in peer else near
    return home and ("podSelector" not in peer or matches(peer["podSelector"], labels))


@pytest.fixture(scope="module")
def network(manifests: Manifests) -> Network:
    return Network(manifests)


def test_every_flow_there_is_and_no_other(manifests: Manifests, network: Network) -> None:
    components = ("control", "storage", "compute", "endpoints")
    for source, target in product(components, repeat=2):
        for port in set(manifests.one(target).ports.values()) - METRICS:
            expected = (source, target, port) in FLOWS
            allowed = network.allows(network.party(source), network.party(target), port)
            assert allowed == expected, (source, target, port)


@pytest.mark.parametrize("who", [STRANGER, NEIGHBOUR, PROMETHEUS])
def test_clients_reach_the_endpoints_only(
    manifests: Manifests, network: Network, who: Party
) -> None:
    # One beside us is kept from calling out by the namespace's own default.
    for port in CLIENTS:
        assert network.allows(who, network.party("endpoints"), port) == (who is not NEIGHBOUR)
    for component in ("control", "storage", "compute"):
        for port in set(manifests.one(component).ports.values()) - METRICS:
            assert not network.allows(who, network.party(component), port), (component, port)


def test_metrics_are_for_the_monitoring_namespace(manifests: Manifests, network: Network) -> None:
    for component in ("control", "storage", "compute", "endpoints"):
        for port in METRICS & set(manifests.one(component).ports.values()):
            assert network.allows(PROMETHEUS, network.party(component), port)
            assert not network.allows(STRANGER, network.party(component), port)


def test_everybody_can_look_names_up(network: Network) -> None:
    for component in ("control", "storage", "compute", "endpoints"):
        assert network.allows(network.party(component), RESOLVER, DNS)
        assert not network.allows(network.party(component), STRANGER, 443)
