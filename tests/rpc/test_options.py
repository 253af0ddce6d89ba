"""A process says who it is, or that it is nobody; one that says neither does not start.

Method: the real processes of all kinds, with the options there are.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from boreal.certificates import issue

_CONTROL = "--control=127.0.0.1:1"
_PORTS = {"--log-port": 1, "--frames-port": 2, "--pages-port": 3, "--page-frames-port": 4}


def commands(home: Path) -> dict[str, list[str]]:
    """What each kind of process needs besides."""
    (home / "password").write_text("secret")
    data = f"--data-dir={home / 'data'}"
    return {
        "control_plane": [data, "--port=1"],
        "control_plane.endpoints": [_CONTROL, "--writer-port=1", "--reader-port=2"],
        "storage_node": [
            *("--name=sn-1", "--zone=a", data, _CONTROL),
            *(f"{option}={port}" for option, port in _PORTS.items()),
        ],
        "compute_node": [
            *("--name=db-1", data, _CONTROL, "--port=1", "--postgres-port=2"),
            f"--password-file={home / 'password'}",
        ],
    }


def run(kind: str, home: Path, *security: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", kind, *commands(home)[kind], *security],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


KINDS = ("control_plane", "control_plane.endpoints", "storage_node", "compute_node")


@pytest.mark.parametrize("kind", KINDS)
def test_who_says_neither_does_not_start(kind: str, tmp_path: Path) -> None:
    done = run(kind, tmp_path)
    assert done.returncode == 1
    assert "--tls-dir" in done.stderr
    assert "--insecure" in done.stderr


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("control_plane", "both"),
        ("control_plane.endpoints", "empty"),
        ("storage_node", "both"),
        ("compute_node", "empty"),
    ],
)
def test_who_says_it_wrongly_does_not_start(kind: str, wrong: str, tmp_path: Path) -> None:
    own = tmp_path / "tls" / "own"
    if wrong == "both":
        issue(own.parent, [own.name])
    else:
        own.mkdir(parents=True)
    options = [f"--tls-dir={own}", *(["--insecure"] if wrong == "both" else [])]
    done = run(kind, tmp_path, *options)
    assert done.returncode == 1
    assert ("one of the two" if wrong == "both" else "cannot read") in done.stderr
