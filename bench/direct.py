"""Boreal without its writer endpoint: what that one costs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from bench.accounting import Tree
from bench.load import Target
from bench.systems import Boreal, StorageState


class PastTheEndpoint:
    """A cluster whose clients connect to the writer's own port.

    Made of a `Boreal` that is measured through its endpoint in the same run: two clusters differ by
    more than an endpoint costs. Whoever comes first starts it, pauses it, stops it.
    """

    title = "the same Boreal, clients at the instance's own port instead of the writer endpoint"

    def __init__(self, boreal: Boreal) -> None:
        self._boreal = boreal

    @property
    def target(self) -> Target:
        return self._boreal.direct_target

    def start(self) -> None:
        self._boreal.start()

    def stop(self) -> None:
        self._boreal.stop()

    def pause(self) -> None:
        self._boreal.pause()

    def resume(self) -> None:
        self._boreal.resume()

    def trees(self) -> Sequence[Tree]:
        return self._boreal.trees()

    def shipped_bytes(self) -> int | None:
        return self._boreal.shipped_bytes()

    def storage_state(self) -> StorageState | None:
        return self._boreal.storage_state()

    def under_load(self) -> AbstractContextManager[None]:
        return self._boreal.under_load()
