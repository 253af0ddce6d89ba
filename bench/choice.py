"""The systems of a run, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.direct import PastTheEndpoint
from bench.plan import SystemName
from bench.systems import Boreal, StockAlone, StockQuorum, System
from boreal.engine import Engine

_OPTIONS = ("--insecure",)
"""As the others: their standbys are not shown certificates either."""


def make_system(
    name: SystemName, engine: Engine, directory: Path, made: Mapping[SystemName, System]
) -> System:
    """The system of that name; its data go to `directory`, which must not exist yet.

    `made` are those the run has already: what can be measured on one of them needs none of its own.
    """
    match name:
        case SystemName.BOREAL:
            return Boreal(directory, options=_OPTIONS)
        case SystemName.PAGES_STOPPED:
            return Boreal(directory, options=_OPTIONS, pages_stopped=True)
        case SystemName.DIRECT:
            boreal = made.get(SystemName.BOREAL)
            if not isinstance(boreal, Boreal):
                boreal = Boreal(directory, options=_OPTIONS)
            return PastTheEndpoint(boreal)
        case SystemName.QUORUM:
            return StockQuorum(engine, directory)
        case SystemName.ALONE:
            return StockAlone(engine, directory)
