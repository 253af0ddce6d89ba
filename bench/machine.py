"""What the figures were taken on and with, for the JSON file."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import psutil

from bench.workspace import filesystem
from boreal.engine import Engine


def describe_machine(directory: Path) -> dict[str, object]:
    """The machine, and how busy it was before we began."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "filesystem": filesystem(directory),
        "load_average_before": os.getloadavg(),
    }


def describe_versions(engine: Engine) -> dict[str, object]:
    """Of everything that takes part."""
    return {
        "boreal": metadata.version("boreal"),
        "commit": _commit(),
        "postgres": engine.run("postgres", "--version").strip(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("grpcio", "uvloop", "lmdb")},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    return done.stdout.strip() or None
