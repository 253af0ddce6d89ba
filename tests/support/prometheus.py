"""A real Prometheus, if the machine has one, and what is asked of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import yaml

from boreal.cluster import HOST, free_ports
from boreal.waiting import wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"
_START_LIMIT_S = 30.0

needed = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="there is no prometheus or promtool here (Debian: apt-get install prometheus)",
)


def promtool(*arguments: str | Path, stdin: str | None = None) -> str:
    """Run the tool; AssertionError with all it says if it finds anything wrong."""
    done = subprocess.run(
        ["promtool", *map(str, arguments)],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


class Prometheus:
    """A running one. Scrapes every second, so that a test need not wait for minutes."""

    def __init__(self, port: int) -> None:
        self._base = f"http://{HOST}:{port}/"

    def ask(self, what: str, **parameters: str) -> Any:
        """One call of its API; its `data`."""
        url = self._base + "api/v1/" + what + "?" + urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def values(self, expression: str) -> list[float]:
        """What an expression comes to now; only numbers count."""
        found = self.ask("query", query=expression)
        samples = [each["value"] for each in found["result"]]
        return [value for _, text in samples if isfinite(value := float(text))]

    def ready(self) -> bool:
        """Whether it answers queries."""
        try:
            with urllib.request.urlopen(self._base + "-/ready", timeout=10):
                return True
        except OSError:
            return False


@contextmanager
def prometheus(folder: Path, targets: Path) -> Iterator[Prometheus]:
    """One with the configuration in `deploy`, but other targets and seconds for minutes."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yml")]
    (job,) = config["scrape_configs"]
    job["file_sd_configs"] = [{"files": [str(targets)], "refresh_interval": "1s"}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={HOST}:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        found = Prometheus(port)
        wait_until(
            lambda: process.poll() is not None or found.ready(),
            timeout_s=_START_LIMIT_S,
            otherwise=lambda: AssertionError((folder / "prometheus.log").read_text()),
        )
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        yield found
    finally:
        process.terminate()
        process.wait(20)
