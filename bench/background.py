"""pgbench in the background of an experiment, again and again whatever becomes of its server."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Self

from bench.load import Target
from boreal.engine import Engine
from boreal.errors import ProcessFailed

_RUN_S = 3600
_AGAIN_S = 0.1
_STOP_S = 10.0


class Pgbench:
    """A load of TPC-B through one connection string, from entering until leaving.

    pgbench's clients give up for good when their connection breaks; once all have, it ends, and is
    started again here.
    """

    def __init__(
        self, engine: Engine, target: Target, directory: Path, clients: int, rate: int = 0
    ) -> None:
        """`rate` is in transactions a second, 0 for as many as it can."""
        self._command = [
            *(str(engine.tool("pgbench")), "--no-vacuum", "--builtin=tpcb-like"),
            *(f"--client={clients}", "--jobs=1", f"--time={_RUN_S}"),
            *([f"--rate={rate}"] if rate else []),
        ]
        self._environment = engine.environment(target.environment())
        self._output = directory / "pgbench.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pgbench", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self.restart()
        self._thread.join(_STOP_S)
        if self._thread.is_alive():
            raise ProcessFailed("pgbench does not end")

    def restart(self) -> None:
        """End the run under way; the next one connects anew."""
        process = self._process
        if process is not None:
            process.kill()  # does nothing to a process that has ended

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._output.open("wb") as output:
                self._process = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            if self._stopping.is_set():  # told so while it was being started
                self._process.kill()
            self._process.wait()
            self._stopping.wait(_AGAIN_S)
