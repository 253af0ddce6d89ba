"""Goal: an operator sees with Prometheus and Grafana how a cluster is.

Method: a cluster of real processes with a reader, under load, after a failover. What each process
says is read by the official OpenMetrics parser and by promtool's linter; every query of the
dashboard, and every alert, is evaluated by a real Prometheus that scrapes the cluster.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.cluster.local import LocalCluster, local_cluster, until
from tests.support.prometheus import DEPLOY, Prometheus, needed, prometheus, promtool

pytestmark = pytest.mark.timeout(240)

_OPENMETRICS = "application/openmetrics-text; version=1.0.0"
_TARGETS = "prometheus-targets.json"
_DASHBOARD = DEPLOY / "grafana" / "dashboards" / "boreal.json"
_DATA_WITHIN_S = 20.0
_METRIC = re.compile(r"\b(boreal_[a-z0-9_]+)\b")
_MOST_SAMPLES = 1000
"""Of one process: labels that grow with the data or with time would soon exceed it."""
_OF_THE_CLIENT_LIBRARY = "process_"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster("--readers=1") as running:
        running.query(
            "create table cold as select g, repeat('x', 500) from generate_series(1, 9000) g"
        )
        yield running


@pytest.fixture(scope="module")
def observed(
    cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """A Prometheus that saw the cluster work."""
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus(folder, cluster.directory / _TARGETS) as running:
        until(
            lambda: running.values("sum(up) == 16") or None, 20, "a scrape of each of the processes"
        )
        _work(cluster)
        yield running


def _work(cluster: LocalCluster) -> None:
    """Commits, cold pages, cuts, and a failover."""
    before = cluster.writer_name()
    for statement in (
        "create table cut as select generate_series(1, 3000) as id",
        "truncate cut",
        "create table counted as select generate_series(1, 1000) as id, 0 as n",
    ):
        cluster.query(statement)
    cluster.boreal("failover")
    load = cluster.pgbench("--no-vacuum", "--client=2", "--time=3", f"--file={_script(cluster)}")
    until(lambda: cluster.instance_status(before).takes_clients or None, 60, "the former writer")
    cluster.query("select count(*), sum(length(repeat)) from cold", cluster.dsn_of(before))
    said, _ = load.communicate(timeout=60)
    assert load.returncode == 0, said


def _script(cluster: LocalCluster) -> Path:
    path = cluster.directory / "load.sql"
    path.write_text(
        "\\set id random(1, 1000)\nupdate counted set n = n + 1 where id = :id;\n", encoding="utf-8"
    )
    return path


# --- what the processes say ----------------------------------------------------------------------


def _targets(cluster: LocalCluster) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((cluster.directory / _TARGETS).read_text())
    return found


def _scrape(address: str, accept: str = _OPENMETRICS) -> str:
    request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith(accept.split(";", maxsplit=1)[0])
        text: str = answer.read().decode()
    return text


def _families(cluster: LocalCluster) -> dict[tuple[str, str], list[Metric]]:
    return {
        (each["labels"]["instance"], each["labels"]["component"]): list(
            text_string_to_metric_families(  # type: ignore[no-untyped-call]
                _scrape(each["targets"][0])
            )
        )
        for each in _targets(cluster)
    }


def _lint(family: Metric) -> Iterator[str]:
    """What is wrong with a family by Prometheus' conventions, beyond what the parser checks."""
    name = family.name
    if not name.startswith(("boreal_", _OF_THE_CLIENT_LIBRARY)):
        yield "its name does not begin with boreal_"
    if not family.documentation.endswith("."):
        yield "its help is no sentence"
    if re.search(r"_(ms|us|milliseconds|microseconds|kib|mib|kb|mb|percent|lsn)$", name):
        yield "its unit is no base unit"
    if name.endswith(("_seconds", "_bytes")) != bool(family.unit) and name.startswith("boreal_"):
        yield "its unit is not declared"
    if family.type == "gauge" and name.endswith(("_total", "_count", "_sum", "_info")):
        yield "its name is that of another type"
    if family.type == "unknown":
        yield "it has no type"
    for sample in family.samples:
        if reserved := {"instance", "job", "component"} & sample.labels.keys():
            if name != "boreal_process":
                yield f"it uses the labels of targets: {reserved}"
            break


def test_every_process_speaks_openmetrics(cluster: LocalCluster) -> None:
    families = _families(cluster)
    nodes = [(f"sn-{n}", kind) for n in range(1, 7) for kind in ("storage", "pages")]
    instances = [(name, "compute") for name in cluster.instances]
    assert set(families) == {
        ("control", "control"), ("endpoints", "endpoints"), *nodes, *instances
    }  # fmt: skip
    wrong = [
        f"{family.name} of {who}: {what}"
        for who, found in families.items()
        for family in found
        for what in _lint(family)
    ]
    assert not wrong, "\n".join(wrong)
    for (name, component), found in families.items():
        about = next(family for family in found if family.name == "boreal_process").samples[0]
        assert (about.labels["name"], about.labels["component"]) == (name, component)
        assert sum(len(family.samples) for family in found) < _MOST_SAMPLES


@needed
def test_promtool_finds_nothing_to_say_of_the_metrics(cluster: LocalCluster) -> None:
    for target in _targets(cluster):
        promtool("check", "metrics", stdin=_scrape(target["targets"][0], "text/plain"))


def test_status_tells_where_metrics_are(cluster: LocalCluster) -> None:
    status = cluster.status()
    told = {status["control"]["metrics"], status["endpoints"]["metrics"]}
    for row in (*status["storage"], *status["compute"]):
        told |= {row["metrics"], row.get("pages_metrics", row["metrics"])}
    assert told == {target["targets"][0] for target in _targets(cluster)}


# --- what Prometheus and Grafana make of it ------------------------------------------------------


def _dashboard_queries() -> list[tuple[str, str]]:
    """(panel, expression) of every query, annotations included."""
    dashboard = json.loads(_DASHBOARD.read_text())
    panels = [
        (panel["title"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]
    assert len(panels) > 50
    return panels + [(each["name"], each["expr"]) for each in dashboard["annotations"]["list"]]


@needed
def test_every_query_of_the_dashboard_returns_data(observed: Prometheus) -> None:
    missing = _dashboard_queries()

    def look() -> bool:
        missing[:] = [each for each in missing if not observed.values(_now(each[1]))]
        return not missing

    try:
        until(look, _DATA_WITHIN_S, "data of every query")
    except AssertionError:
        pytest.fail(f"no data of {missing}")


def _now(query: str) -> str:
    """The query as Grafana would send it, for scrapes every second."""
    return query.replace("$__rate_interval", "30s")


@needed
def test_the_dashboards_numbers_are_those_of_the_cluster(
    cluster: LocalCluster, observed: Prometheus
) -> None:
    status = cluster.status()
    assert observed.values("max(boreal_cluster_epoch)") == [status["volume"]["epoch"]]
    (writer,) = observed.ask("query", query='boreal_cluster_instance_role{role="writer"} == 1')[
        "result"
    ]
    assert writer["metric"]["name"] == status["writer"]
    assert observed.values("sum(boreal_failover_seconds_count)") == [1]
    for share in observed.values(
        "boreal_link_scl_bytes - on () group_left () max(boreal_cluster_vdl_bytes)"
    ):
        assert abs(share) < 1024 * 1024
    commits = "sum(rate(boreal_segment_appends_total[1m])) > 0"
    assert observed.values(commits)


@needed
def test_alerts_are_sound_and_quiet_in_a_healthy_cluster(observed: Prometheus) -> None:
    promtool("check", "rules", DEPLOY / "prometheus" / "alerts.yml")
    until(lambda: _evaluated(observed) or None, 10, "an evaluation of every rule")
    rules = [rule for group in observed.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    known = set(observed.ask("label/__name__/values"))
    for rule in rules:
        assert set(_METRIC.findall(rule["query"])) <= known, rule["query"]
    firing = {alert["labels"]["alertname"] for alert in observed.ask("alerts")["alerts"]}
    assert firing <= {"BorealFailover", "BorealInstanceLost"}


def _evaluated(observed: Prometheus) -> bool:
    groups = observed.ask("rules")["groups"]
    return all(rule["health"] != "unknown" for group in groups for rule in group["rules"])


@needed
def test_a_lost_zone_is_told(cluster: LocalCluster, observed: Prometheus) -> None:
    """Comes last: it leaves the cluster with four nodes."""
    for node in ("sn-1", "sn-2"):
        cluster.boreal("kill", node)

    def pending() -> set[str]:
        return {alert["labels"]["alertname"] for alert in observed.ask("alerts")["alerts"]}

    expected = {"BorealZoneLost", "BorealStorageNodeAway", "BorealNoFurtherNode"}
    expected |= {"BorealLostRedundancy", "BorealProcessDown"}
    until(lambda: expected <= pending() or None, 15, "alerts that tell of the zone")
    zone = observed.ask("query", query="sum by (zone) (boreal_cluster_storage_alive) == 0")
    assert [each["metric"]["zone"] for each in zone["result"]] == ["a"]


def test_prometheus_configurations_name_every_process() -> None:
    """The one for compose: by service names, every process once, with the same labels."""
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "compose.yml").read_text())["scrape_configs"]
    targets = [target for group in job["static_configs"] for target in group["targets"]]
    nodes = [f"sn-{n}:{port}" for n in range(1, 7) for port in (9101, 9102)]
    instances = [f"db-{n}:9101" for n in range(1, 4)]
    assert sorted(targets) == sorted(["control:9101", "endpoints:9101", *nodes, *instances])
    zones = {
        t: g["labels"]["zone"] for g in job["static_configs"] for t in g["targets"] if "sn-" in t
    }
    assert {zone: sum(z == zone for z in zones.values()) for zone in "abc"} == dict.fromkeys(
        "abc", 4
    )
