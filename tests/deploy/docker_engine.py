"""A Docker engine for tests: the one that runs, or one that is started; else a reason to skip.

Also the base image that the Dockerfile asks for, made by debootstrap where no registry has it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BASE_IMAGE = "python:3.11-slim-bookworm"
_START_S = 60.0
_PULL_S = 120.0
_BOOTSTRAP_S = 400.0
_DEBIAN = "python3,python3-venv,python3-pip,ca-certificates"


def docker(*arguments: str, timeout_s: float = 60, check: bool = True) -> str:
    """Run `docker`; what it printed. AssertionError if it fails and `check`."""
    return run(["docker", *arguments], timeout_s=timeout_s, check=check)


def run(
    command: list[str],
    *,
    timeout_s: float,
    check: bool = True,
    environment: dict[str, str] | None = None,
) -> str:
    """Run a program; what it printed, errors included."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return done.stdout


@contextmanager
def engine() -> Iterator[None]:
    """Within it a Docker engine answers. Skips, with the reason, where none can be had."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed (Debian: docker.io, docker-compose)")
    if compose() is None:
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    if _answers():
        yield
    else:
        with _started():
            yield


def compose() -> list[str] | None:
    """The command of Docker Compose, as a plugin or by itself."""
    if succeeds("docker", "compose", "version"):
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def succeeds(*command: str) -> bool:
    """Whether a program ends well."""
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    return done.returncode == 0


def _answers() -> bool:
    return succeeds("docker", "version")


@contextmanager
def _started() -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip(
            "no Docker engine answers, and none can be started: that takes root and dockerd"
        )
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(["dockerd"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + _START_S
            while not _answers():
                if process.poll() is not None or time.monotonic() > deadline:
                    last = Path(log.name).read_text().splitlines()[-3:]
                    pytest.skip("dockerd does not start here: " + " / ".join(last))
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            process.wait(60)


def need_base_image() -> None:
    """Have the image that the Dockerfile begins with. Skips where it cannot be had."""
    if succeeds("docker", "image", "inspect", BASE_IMAGE):
        return
    with tempfile.TemporaryDirectory() as scratch:
        try:
            docker("pull", "--quiet", BASE_IMAGE, timeout_s=_PULL_S)
        except (AssertionError, subprocess.TimeoutExpired) as no_registry:
            if os.geteuid() != 0 or shutil.which("debootstrap") is None:
                pytest.skip(f"no {BASE_IMAGE}, nor debootstrap and root to make it: {no_registry}")
            _bootstrap(Path(scratch) / "root")


def _bootstrap(root: Path) -> None:
    """As the issue "Deploy" describes it: Debian's own Python 3.11 under that name."""
    options = ["--variant=minbase", f"--include={_DEBIAN}", "bookworm", str(root)]
    run(["debootstrap", *options], timeout_s=_BOOTSTRAP_S)
    run(["sh", "-c", f"tar -C {root} -c . | docker import - {BASE_IMAGE}"], timeout_s=_BOOTSTRAP_S)
