"""Goal: each alert fires for what it is meant for, and none in a healthy cluster.

Method: promtool's own simulation of rules over series; each case is the healthy cluster but for one
thing, of half an hour.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.prometheus import DEPLOY, needed, promtool

pytestmark = needed

ALERTS = DEPLOY / "prometheus" / "alerts.yml"
ZONES = {"sn-1": "a", "sn-2": "a", "sn-3": "b", "sn-4": "b", "sn-5": "c", "sn-6": "c"}
MIB = 1024 * 1024


def healthy() -> dict[str, str]:
    """Series and their values, a minute apart."""
    series = {
        "boreal_cluster_volume_ready": "1x40",
        "boreal_cluster_writer_serves": "1x40",
        'boreal_instance_state{instance="db-1",state="writer"}': "1x40",
        'boreal_instance_control_silence_seconds{instance="db-1"}': "0.3x40",
        'boreal_endpoint_waiting_connections{endpoint="writer"}': "0x40",
        'boreal_reader_lag_seconds{instance="db-2"}': "0.01x40",
        'boreal_reader_lag_bytes{instance="db-2"}': "4096x40",
        'boreal_writer_backlog_bytes{instance="db-1"}': "1000x40",
        'boreal_writer_backlog_limit_bytes{instance="db-1"}': f"{64 * MIB}x40",
        'boreal_page_failures_total{instance="db-1"}': "0x40",
        **{
            f'boreal_commit_latency_seconds_bucket{{instance="db-1",le="{bound}"}}': "0+600x40"
            for bound in ("0.131072", "0.262144", "0.524288", "+Inf")
        },
        **{
            f'boreal_events_total{{kind="{kind}"}}': "1x40"
            for kind in ("failover_completed", "failover_failed", "instance_lost")
        },
    }
    for node, zone in ZONES.items():
        where, here = f'{{node="{node}",zone="{zone}"}}', f'{{instance="{node}"}}'
        series |= {
            f'up{{job="boreal",instance="{node}",component="storage"}}': "1x40",
            f"boreal_cluster_storage_alive{where}": "1x40",
            f'boreal_link_state{{instance="db-1",node="{node}",state="streaming"}}': "1x40",
            f"boreal_cluster_segment_lag_bytes{where}": "8192x40",
            f"boreal_cluster_segment_failed{where}": "0x40",
            f"boreal_pages_failed{here}": "0x40",
            f"boreal_storage_broken_volumes{here}": "0x40",
            f"boreal_pages_refused{here}": "0x40",
            f"boreal_pages_index_lag_bytes{here}": "100000x40",
            f"boreal_segment_ack_delay_seconds{here}": "0x40",
            f"boreal_segment_log_kept_bytes{here}": f"{300 * MIB}x40",
            f"boreal_pages_retirement_held{here}": "0x40",
            f"boreal_storage_filesystem_free_bytes{here}": "50x40",
            f"boreal_storage_filesystem_size_bytes{here}": "100x40",
        }
    return series


def away(*nodes: str) -> dict[str, str]:
    return {
        f'boreal_cluster_storage_alive{{node="{node}",zone="{ZONES[node]}"}}': "0x40"
        for node in nodes
    }


CASES: dict[str, dict[str, str]] = {
    "BorealNoWriter": {"boreal_cluster_writer_serves": "0x40"},
    "BorealNoWriteQuorum": away("sn-1", "sn-3", "sn-5"),
    "BorealNoFurtherNode": away("sn-1", "sn-3"),
    "BorealZoneLost": away("sn-3", "sn-4"),
    "BorealProcessDown": {'up{job="boreal",instance="sn-2",component="storage"}': "0x40"},
    "BorealControlPlaneAway": {
        'boreal_instance_control_silence_seconds{instance="db-1"}': "20+60x40"
    },
    "BorealConnectionsWait": {'boreal_endpoint_waiting_connections{endpoint="writer"}': "3x40"},
    "BorealStorageNodeAway": away("sn-6"),
    "BorealLostRedundancy": {
        'boreal_link_state{instance="db-1",node="sn-4",state="streaming"}': "0x40"
    },
    "BorealSegmentBehind": {
        'boreal_cluster_segment_lag_bytes{node="sn-1",zone="a"}': f"{65 * MIB}x40"
    },
    "BorealSegmentFailed": {'boreal_pages_failed{instance="sn-1"}': "1x40"},
    "BorealBrokenVolume": {'boreal_storage_broken_volumes{instance="sn-1"}': "1x40"},
    "BorealPagesRefused": {'boreal_pages_refused{instance="sn-1"}': "2x40"},
    "BorealIndexLag": {'boreal_pages_index_lag_bytes{instance="sn-1"}': f"{33 * MIB}x40"},
    "BorealWriterSlowed": {
        f'boreal_segment_ack_delay_seconds{{instance="{node}"}}': "0.02x40"
        for node in ("sn-1", "sn-2", "sn-3")
    },
    "BorealReaderLag": {'boreal_reader_lag_bytes{instance="db-2"}': f"{65 * MIB}x40"},
    "BorealBacklog": {'boreal_writer_backlog_bytes{instance="db-1"}': f"{40 * MIB}x40"},
    "BorealCommitsSlow": {
        'boreal_commit_latency_seconds_bucket{instance="db-1",le="0.131072"}': "0+100x40",
        'boreal_commit_latency_seconds_bucket{instance="db-1",le="0.262144"}': "0+100x40",
    },
    "BorealPageReadsFail": {'boreal_page_failures_total{instance="db-1"}': "0+1x40"},
    "BorealLogNotDropped": {'boreal_segment_log_kept_bytes{instance="sn-1"}': f"{3000 * MIB}x40"},
    "BorealRetirementHeld": {'boreal_pages_retirement_held{instance="sn-1"}': "1x40"},
    "BorealDiskFills": {'boreal_storage_filesystem_free_bytes{instance="sn-1"}': "9x40"},
    "BorealFailover": {'boreal_events_total{kind="failover_completed"}': "1x28 2x12"},
    "BorealFailoverFailed": {'boreal_events_total{kind="failover_failed"}': "1x28 2x12"},
    "BorealInstanceLost": {'boreal_events_total{kind="instance_lost"}': "1x28 2x12"},
}
"""What is different, by the alert that is to fire."""

ACCOMPANIED = {
    "BorealNoWriteQuorum": {"BorealStorageNodeAway"},
    "BorealNoFurtherNode": {"BorealStorageNodeAway"},
    "BorealZoneLost": {"BorealStorageNodeAway", "BorealNoFurtherNode"},
}


def simulate(folder: Path, cases: dict[str, tuple[dict[str, str], set[str]]]) -> None:
    """For each case: only these alerts fire after half an hour."""
    tests = [
        {
            "name": name,
            "interval": "1m",
            "input_series": [{"series": s, "values": v} for s, v in series.items()],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"}) > bool 0',
                    "eval_time": "30m",
                    "exp_samples": [
                        {"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in firing
                    ],
                }
            ],
        }
        for name, (series, firing) in cases.items()
    ]
    path = folder / "tests.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "tests": tests}))
    promtool("test", "rules", path)


def test_every_alert_has_a_case() -> None:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert set(CASES) == {rule["alert"] for rule in rules}
    assert {rule["labels"]["severity"] for rule in rules} == {"critical", "warning", "info"}
    for rule in rules:
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]


def test_each_alert_fires_for_its_case_and_none_in_health(tmp_path: Path) -> None:
    cases = {
        alert: (healthy() | different, {alert} | ACCOMPANIED.get(alert, set()))
        for alert, different in CASES.items()
    }
    simulate(tmp_path, {**cases, "health": (healthy(), set())})


def test_a_writer_cut_off_from_three_nodes_is_told_though_all_report(tmp_path: Path) -> None:
    cut = {
        f'boreal_link_state{{instance="db-1",node="{node}",state="streaming"}}': "0x40"
        for node in ("sn-1", "sn-3", "sn-5")
    }
    firing = {"BorealNoWriteQuorum", "BorealLostRedundancy"}
    simulate(tmp_path, {"cut off": (healthy() | cut, firing)})


@pytest.mark.parametrize("writes", ["db-1", None])
def test_without_a_control_plane_the_instances_tell_whether_there_is_a_writer(
    tmp_path: Path, writes: str | None
) -> None:
    series = {name: v for name, v in healthy().items() if not name.startswith("boreal_cluster_")}
    if writes is None:
        series['boreal_instance_state{instance="db-1",state="writer"}'] = "0x40"
    simulate(tmp_path, {"away": (series, set() if writes else {"BorealNoWriter"})})
