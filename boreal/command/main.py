"""The verbs of the `boreal` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import click

from boreal import cluster
from boreal.cluster import ClusterConfig
from boreal.command.size import Size
from boreal.errors import BadUsage, BorealError

_FOLLOW_POLL_S = 0.1


class _Refusal(click.ClickException):
    """A BorealError, as people see it: what happened and what to do, and no traceback."""

    def __init__(self, error: BorealError) -> None:
        super().__init__(error.message)

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it on standard error."""
        click.secho("error: ", fg="red", bold=True, nl=False, err=True, file=file)
        click.echo(self.message, err=True, file=file)


class _Misuse(_Refusal):
    """One that another command line would have avoided."""

    exit_code = click.UsageError.exit_code


class _Verbs(click.Group):
    """Prints errors of ours without a traceback, and lists the verbs in the order of a day."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except BadUsage as error:
            raise _Misuse(error) from error
        except BorealError as error:
            raise _Refusal(error) from error

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """In the order of their definition."""
        return list(self.commands)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="boreal")
def main() -> None:
    """PostgreSQL 16 on a log-structured volume, kept six ways over three zones."""


def _data_dir_option(verb: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--data-dir",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="BOREAL_DATA_DIR",
        default=cluster.default_data_dir,
        show_default=str(cluster.default_data_dir()),
        callback=lambda _ctx, _param, path: path.absolute(),
        help="The cluster's directory; also $BOREAL_DATA_DIR.",
    )(verb)


# --- the whole cluster ---------------------------------------------------------------------------


@main.command()
@_data_dir_option
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help=f"Where PostgreSQL listens.  [default: {cluster.POSTGRES_PORT}, or as before]",
)
@click.option(
    "--retain-log-mib",
    type=click.IntRange(1),
    help="How much log a storage node keeps that nobody needs; for nodes started from now on.",
)
@click.option(
    "--cache-size",
    type=Size(least_bytes=16 * 1024 * 1024),
    metavar="SIZE",
    help="Bound on the pages the compute node keeps on its disk: 512MB, 2GB, unlimited; for one "
    "started from now on. A soft bound: pages just written or read, and those that running "
    "transactions may have changed, come on top.  [default: unlimited, or as before]",
)
def up(
    data_dir: Path,
    port: int | None,
    retain_log_mib: int | None,
    cache_size: int | None,
) -> None:
    """Start the cluster, or what is missing of it; return when SQL is served."""
    from boreal.command.card import Terminal, card
    from boreal.command.lifecycle import UpOptions, bring_up

    options = UpOptions(
        data_dir=data_dir,
        postgres_port=port,
        retain_log_mib=retain_log_mib,
        cache_bytes=cache_size,
    )
    terminal = Terminal()
    config = bring_up(options, terminal)
    terminal.phase("up, in all", terminal.elapsed_s)
    click.echo(card(config))


@main.command()
@_data_dir_option
def down(data_dir: Path) -> None:
    """Stop the cluster. Data stays; `boreal up` continues with it."""
    from boreal.command.card import Terminal
    from boreal.command.lifecycle import take_down

    terminal = Terminal()
    take_down(data_dir, terminal)
    terminal.phase("down", terminal.elapsed_s)


@main.command()
@_data_dir_option
@click.option("--json", "as_json", is_flag=True, help="For programs; see below.")
@click.option("--watch", is_flag=True, help="Show it again every second.")
def status(data_dir: Path, as_json: bool, watch: bool) -> None:
    """Who is there, in which role, and how far each one is.

    \b
    --json prints one object:
      data_dir   the cluster's directory
      control    name, process, pid, answers
      volume     id, ready, epoch, vdl
      writer     its name, or null
      storage    for each node: name, zone, process, pid, alive, silent_ms,
                 promised_epoch, scl, lag_bytes (behind the VDL), indexed_lsn,
                 indexed_lag_bytes (behind its SCL), failure
      compute    for each node: name, role, process, pid, alive, silent_ms,
                 state, epoch, incarnation, vdl, flush_lsn, replay_lsn,
                 bundle_end_lsn, timeline, postgres_pid, postgres_port,
                 shipped_bytes, links (node, state, scl, ack_latency_us)
    `process` is running, paused, dead or stopped. LSNs are text as PostgreSQL
    writes them. What is not known, as when the control plane is down, is null.
    """
    import asyncio

    from boreal.command import status as view

    config = cluster.load(data_dir)
    if as_json:
        import json

        click.echo(json.dumps(view.to_json(asyncio.run(view.gather(config))), indent=2))
        return
    from rich.console import Console

    if watch:
        asyncio.run(_watch(config))
        return
    Console().print(view.to_table(asyncio.run(view.gather(config))))


async def _watch(config: ClusterConfig) -> None:
    import asyncio

    from rich.live import Live

    from boreal.command import status as view

    with Live(view.to_table(await view.gather(config)), auto_refresh=False) as live:
        while True:
            await asyncio.sleep(1.0)
            live.update(view.to_table(await view.gather(config)), refresh=True)


@main.command()
@_data_dir_option
@click.option("--node", "nodes", multiple=True, metavar="NAME", help="Only this storage node.")
@click.option(
    "--offline",
    metavar="NAME|DIR",
    help="Check the files of this stopped storage node instead, page by page, record by record.",
)
def verify(data_dir: Path, nodes: tuple[str, ...], offline: str | None) -> None:
    """Compare every page that storage materializes with PostgreSQL's own.

    Every storage node is compared with its peers, too. Names each page that differs, and fails if
    there is any.
    """
    import asyncio

    from rich.console import Console

    from boreal.command.roster import storage_names
    from boreal.command.verify import verify as run
    from boreal.command.verify import verify_offline

    if offline is not None:
        sys.exit(verify_offline(data_dir, offline))
    config = cluster.load(data_dir)
    for node in nodes:
        if node not in storage_names():
            raise BadUsage(f"{node} is no storage node; they are {', '.join(storage_names())}")
    if asyncio.run(run(config, nodes, Console())):
        sys.exit(1)


# --- SQL -----------------------------------------------------------------------------------------


@main.command(context_settings={"ignore_unknown_options": True})
@_data_dir_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def psql(data_dir: Path, arguments: tuple[str, ...]) -> None:
    """Open psql at the writer as the master user; ARGUMENTS go to psql."""
    from boreal.command.card import psql_program

    config = cluster.load(data_dir)
    program = str(psql_program())
    environment = {
        **os.environ,
        "PGHOST": cluster.HOST,
        "PGPORT": str(config.postgres_port),
        "PGUSER": cluster.MASTER_USER,
        "PGDATABASE": cluster.DATABASE,
        "PGPASSWORD": config.master_password,  # not an argument: those everybody can see
    }
    os.execve(program, [program, *arguments], environment)  # noqa: S606 - psql takes over


@main.command()
@_data_dir_option
def dsn(data_dir: Path) -> None:
    """Print the writer's connection string."""
    click.echo(cluster.load(data_dir).dsn)


# --- one process ---------------------------------------------------------------------------------


@main.command()
@_data_dir_option
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is added.")
@click.option("-n", "--lines", type=click.IntRange(0), default=50, show_default=True)
def logs(data_dir: Path, name: str, follow: bool, lines: int) -> None:
    """Show the end of a process's log."""
    from boreal.command.roster import check_name
    from boreal.processes import LocalProcesses

    processes = LocalProcesses(data_dir)
    path = processes.log_path(check_name(cluster.load(data_dir), name))
    if not path.exists():
        raise BadUsage(f"{name} has no log yet ({path}); `boreal up` starts the cluster")
    position = path.stat().st_size
    for line in processes.last_lines(name, lines):
        click.echo(line)
    if follow:
        _follow(path, position)


def _follow(path: Path, position: int) -> None:
    import time

    with path.open("rb") as log:
        log.seek(position)
        while True:
            click.echo(log.read(), nl=False)
            time.sleep(_FOLLOW_POLL_S)


@main.command()
@_data_dir_option
@click.argument("name")
def kill(data_dir: Path, name: str) -> None:
    """Kill -9 a process and its children, as a crash would."""
    from boreal.command.roster import check_name
    from boreal.processes import LocalProcesses

    config = cluster.load(data_dir)
    pid = LocalProcesses(data_dir).kill(check_name(config, name))
    click.echo(f"killed {name}, pid {pid}. {_after_kill(name)}")


def _after_kill(name: str) -> str:
    if name == cluster.COMPUTE:
        return "It comes back by itself, with a new epoch: see `boreal status --watch`"
    if name == cluster.CONTROL:
        return "Reads and writes go on without it. Start it with `boreal restart control`"
    return f"Start it with `boreal restart {name}`; it will catch up by itself"


@main.command()
@_data_dir_option
@click.argument("name")
def pause(data_dir: Path, name: str) -> None:
    """Freeze a process and its children (SIGSTOP), as a hung machine would."""
    from boreal.command.roster import check_name
    from boreal.processes import LocalProcesses

    LocalProcesses(data_dir).pause(check_name(cluster.load(data_dir), name))
    click.echo(f"paused {name}. Let it go on with `boreal resume {name}`")


@main.command()
@_data_dir_option
@click.argument("name")
def resume(data_dir: Path, name: str) -> None:
    """Let a paused process go on."""
    from boreal.command.roster import check_name
    from boreal.processes import LocalProcesses

    LocalProcesses(data_dir).resume(check_name(cluster.load(data_dir), name))
    click.echo(f"resumed {name}")


@main.command()
@_data_dir_option
@click.argument("name")
def restart(data_dir: Path, name: str) -> None:
    """Stop a process if it runs, start it, and wait until it does its work."""
    from boreal.command.card import Terminal
    from boreal.command.lifecycle import restart as run
    from boreal.command.roster import check_name

    config = cluster.load(data_dir)
    run(config, check_name(config, name), Terminal())


if __name__ == "__main__":
    main()
