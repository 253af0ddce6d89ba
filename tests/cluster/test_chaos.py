"""Goal: no order of failures loses an acknowledged commit or leaves a wrong page.

Method: two recording clients on a real cluster while a seeded sequence of failures goes on: storage
nodes killed and paused (never more than two at a time), the compute node, its PostgreSQL, a backend
and the control plane killed, also while the last failure is still being repaired. Afterwards all is
started again, every acknowledged row must be there, the nodes must agree, and `boreal verify` must
find no page that differs.

`make chaos` runs many seeds; a failure names its seed: BOREAL_CHAOS_SEEDS=17 pytest tests/cluster
-k chaos.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

import psutil
import pytest

from tests.cluster.local import NODES, LocalCluster, RecordingClient, check_ledgers, until

SEEDS = [int(seed) for seed in os.environ.get("BOREAL_CHAOS_SEEDS", "2").split(",")]
"""Seed 2 found a postmaster that nobody reaped: its zombie kept the next one from starting."""
STEPS = 8
_MOST_NODES_AWAY = 2


class Chaos:
    """One sequence of failures."""

    def __init__(self, cluster: LocalCluster, seed: int) -> None:
        self._cluster = cluster
        self._random = random.Random(seed)
        self._away: dict[str, str] = {}
        self._actions: tuple[Callable[[], str], ...] = (
            self._node_leaves,
            self._node_leaves,
            self._node_returns,
            self._node_returns,
            self._compute_dies,
            self._postgres_dies,
            self._backend_dies,
            self._control_dies,
        )

    def step(self) -> str:
        """Do one thing; say what."""
        return self._random.choice(self._actions)()

    def mend(self) -> None:
        """Bring everybody back."""
        while self._away:
            self._node_returns()

    def _node_leaves(self) -> str:
        if len(self._away) >= _MOST_NODES_AWAY:
            return self._node_returns()
        node = self._random.choice([name for name in NODES if name not in self._away])
        how = self._random.choice(["kill", "pause"])
        self._away[node] = "restart" if how == "kill" else "resume"
        self._cluster.boreal(how, node)
        return f"{how} {node}"

    def _node_returns(self) -> str:
        if not self._away:
            return "nobody is away"
        node = self._random.choice(sorted(self._away))
        how = self._away.pop(node)
        self._cluster.boreal(how, node)
        return f"{how} {node}"

    def _compute_dies(self) -> str:
        self._cluster.boreal("kill", "db-1", check=False)  # it may be between two lives
        return "kill db-1"

    def _postgres_dies(self) -> str:
        return self._kill_postgres("postmaster", lambda postmaster: postmaster)

    def _backend_dies(self) -> str:
        def one_of(postmaster: psutil.Process) -> psutil.Process:
            return self._random.choice(sorted(postmaster.children(), key=lambda p: p.pid))

        return self._kill_postgres("a backend", one_of)

    def _kill_postgres(self, what: str, which: Callable[[psutil.Process], psutil.Process]) -> str:
        try:
            pid_file = self._cluster.directory / "db-1" / "pgdata" / "postmaster.pid"
            postmaster = psutil.Process(int(pid_file.read_text().split()[0]))
            if postmaster.name() == "postgres":
                which(postmaster).kill()
        except (FileNotFoundError, psutil.NoSuchProcess, IndexError):
            return f"no {what} to kill"
        return f"kill {what}"

    def _control_dies(self) -> str:
        self._cluster.boreal("kill", "control")
        self._cluster.boreal("restart", "control")
        return "kill and restart control"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", SEEDS)
def test_chaos(cluster: LocalCluster, seed: int) -> None:
    chaos = Chaos(cluster, seed)
    pace = random.Random(seed + 1)
    story, began = [], time.monotonic()
    clients = [RecordingClient(cluster, f"chaos-{seed}-{n}") for n in range(2)]
    with clients[0], clients[1]:
        for _ in range(STEPS):
            clients[0].progress(pace.choice([0, 5, 40]), timeout_s=90)
            story.append(f"{time.monotonic() - began:6.1f} s  {chaos.step()}")
        chaos.mend()
        for client in clients:
            client.progress(10, timeout_s=90)
    print("\n".join(story))
    check_ledgers(cluster, *clients)

    def agreed() -> bool:
        nodes = cluster.status()["storage"]
        return all(node["alive"] and node["lag_bytes"] == 0 for node in nodes)

    until(agreed, 60, "the nodes to agree")
    assert " 0  pages differ" in cluster.boreal("verify")
