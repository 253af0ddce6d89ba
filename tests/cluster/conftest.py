"""One running cluster for the tests of a module; each leaves it whole for the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.local import LocalCluster, local_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster() as running:
        running.query("create table ledger (client text, n int, primary key (client, n))")
        yield running
