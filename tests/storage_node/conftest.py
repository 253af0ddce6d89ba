"""What the storage node's tests share."""

from __future__ import annotations

import pytest

from tests.storage_node.recorded_run import RecordedRun, record_run


@pytest.fixture(scope="session")
def recorded_run() -> RecordedRun:
    """A stock PostgreSQL's WAL with its own files to compare with; made once, it takes seconds."""
    return record_run()
