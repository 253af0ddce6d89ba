"""One judged server for all themes, and the listing of what its log held."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storage_node.redo.oracle import OracleRun, oracle
from tests.storage_node.redo.record_types import Coverage

_COVERAGE = pytest.StashKey[Coverage]()


@pytest.fixture(scope="session")
def judged(pytestconfig: pytest.Config) -> Iterator[OracleRun]:
    """A server to run themes on, one after the other; `check` after each."""
    with oracle() as run:
        pytestconfig.stash[_COVERAGE] = run.coverage
        yield run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say which record types the themes reached, and how often."""
    coverage = config.stash.get(_COVERAGE, None)
    if coverage is not None:
        terminalreporter.section("record types seen by the redo oracle")
        for line in coverage.listing():
            terminalreporter.write_line(line)
