"""Goal: nothing of a former PostgreSQL is left in a data directory, and nobody else is hurt.

Method: processes that the kernel tells as PostgreSQL's (its name, its working directory), and
others that are almost like it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from compute_node.leftover import end_leftover


@pytest.fixture
def sleepers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def sleep(stack: ExitStack, program: Path, where: Path) -> subprocess.Popen[bytes]:
    where.mkdir(exist_ok=True)
    process = subprocess.Popen([program, "600"], cwd=where)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def copy_of_sleep(path: Path) -> Path:
    shutil.copy(shutil.which("sleep") or "/bin/sleep", path)
    return path


async def test_all_of_it_ends_and_nothing_else(tmp_path: Path, sleepers: ExitStack) -> None:
    postgres, other = copy_of_sleep(tmp_path / "postgres"), copy_of_sleep(tmp_path / "vi")
    pgdata = tmp_path / "pgdata"
    family = [sleep(sleepers, postgres, pgdata) for _ in range(3)]
    elsewhere = sleep(sleepers, postgres, tmp_path / "other")
    visitor = sleep(sleepers, other, pgdata)
    await end_leftover(pgdata)
    assert [process.poll() is not None for process in family] == [True] * 3
    assert elsewhere.poll() is None
    assert visitor.poll() is None


async def test_it_is_found_in_a_directory_that_was_removed(
    tmp_path: Path, sleepers: ExitStack
) -> None:
    pgdata = tmp_path / "pgdata"
    process = sleep(sleepers, copy_of_sleep(tmp_path / "postgres"), pgdata)
    pgdata.rmdir()
    await end_leftover(pgdata)
    assert process.poll() is not None


async def test_no_directory_is_no_trouble(tmp_path: Path) -> None:
    await end_leftover(tmp_path / "never")
