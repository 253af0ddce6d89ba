"""The verbs of the `boreal` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from boreal import cluster
from boreal.cluster import ClusterConfig
from boreal.command.size import Size
from boreal.errors import BadUsage, BorealError

if TYPE_CHECKING:
    from boreal.command.remote import Place
    from boreal.rpc import control_pb2  # takes a tenth of a second
    from boreal.rpc.identity import Identity

_FOLLOW_POLL_S = 0.1
_ELSEWHERE = ("status", "events", "failover", "wait", "health")
"""The verbs that need no more of a cluster than its control plane's address, or not even that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What was said before the verb: of a cluster that runs elsewhere."""

    control: str | None
    tls_dir: Path | None
    insecure: bool

    def identity(self) -> Identity | None:
        """Who the command is to it. BadUsage if that was not said, or cannot be."""
        from boreal.rpc.options import identity_of

        return identity_of(self.tls_dir, insecure=self.insecure)


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
@click.option(
    "--control",
    metavar="HOST:PORT",
    envvar=f"{cluster.ENVIRONMENT_PREFIX}_CONTROL",
    help="The control plane of a cluster that runs elsewhere, in containers say, for the verbs "
    f"{', '.join(_ELSEWHERE)}; also $BOREAL_CONTROL.",
)
@click.option(
    "--tls-dir",
    type=click.Path(path_type=Path, file_okay=False),
    envvar=f"{cluster.ENVIRONMENT_PREFIX}_TLS_DIR",
    help="Holds ca.crt, tls.crt and tls.key: who the command is to a cluster that runs elsewhere; "
    "also $BOREAL_TLS_DIR.",
)
@click.option(
    "--insecure",
    is_flag=True,
    envvar=f"{cluster.ENVIRONMENT_PREFIX}_INSECURE",
    help="That cluster was told to do without; also $BOREAL_INSECURE.",
)
@click.pass_context
def main(context: click.Context, control: str | None, tls_dir: Path | None, insecure: bool) -> None:
    """PostgreSQL 16 on a log-structured volume, kept six ways over three zones."""
    verb = context.invoked_subcommand
    if _given(context, "control") and verb not in _ELSEWHERE:
        raise BadUsage(f"`boreal {verb}` works on this machine's clusters; leave out --control")
    context.obj = _Told(control=control, tls_dir=tls_dir, insecure=insecure)


def _given(context: click.Context, option: str) -> bool:
    return context.get_parameter_source(option) is ParameterSource.COMMANDLINE


def _place(data_dir: Path) -> Place:
    """The cluster that is meant: one elsewhere if its control plane was named. A --data-dir on the
    command line counts more than what the environment says.
    """
    context = click.get_current_context()
    parent = context.find_root()
    told: _Told = parent.obj
    if told.control and (_given(parent, "control") or not _given(context, "data_dir")):
        from boreal.command.remote import Outside

        return Outside(control_address=told.control, identity=told.identity())
    return cluster.load(data_dir)


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
    help=f"The writer endpoint's.  [default: {cluster.POSTGRES_PORT}, or as before]",
)
@click.option(
    "--reader-port",
    type=click.IntRange(1, 65535),
    help="The reader endpoint's.  [default: the one after --port, or as before]",
)
@click.option(
    "--readers",
    type=click.IntRange(0, cluster.MAX_INSTANCES - 1),
    help="Have at least so many readers; none is taken away.  [default: as before]",
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
    help="Bound on the pages an instance keeps on its disk: 512MB, 2GB, unlimited; for one "
    "started from now on. A soft bound: pages just written or read, and those that running "
    "transactions may have changed, come on top.  [default: unlimited, or as before]",
)
@click.option(
    "--insecure/--secure",
    default=None,
    help="Have its processes talk to each other, and to clients, unencrypted.  "
    "[default: with TLS, or as before]",
)
def up(
    data_dir: Path,
    port: int | None,
    reader_port: int | None,
    readers: int | None,
    retain_log_mib: int | None,
    cache_size: int | None,
    insecure: bool | None,
) -> None:
    """Start the cluster, or what is missing of it; return when SQL is served."""
    from boreal.command.card import Terminal, card
    from boreal.command.lifecycle import bring_up
    from boreal.command.settle import UpOptions

    options = UpOptions(
        data_dir=data_dir,
        postgres_port=port,
        reader_port=reader_port,
        readers=readers,
        retain_log_mib=retain_log_mib,
        cache_bytes=cache_size,
        insecure=insecure,
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
@click.option("--watch", is_flag=True, help="Show it again every second, and what happens.")
def status(data_dir: Path, as_json: bool, watch: bool) -> None:
    """Who is there, in which role, and how far each one is.

    \b
    --json prints one object:
      data_dir   the cluster's directory; null with --control
      control    name, process, pid, address, answers
      endpoints  name, process, pid; writer and reader, each with its address
                 and the instances it leads to
      volume     id, ready, epoch, vdl
      writer     the name of the instance appointed last, or null
      storage    for each node: name, zone, process, pid, alive, silent_ms,
                 promised_epoch, scl, lag_bytes (behind the VDL), indexed_lsn,
                 indexed_lag_bytes (behind its SCL), failure
      compute    for each instance: name, role, tier, process, pid, address,
                 alive, silent_ms, state, takes_clients, epoch, incarnation,
                 vdl, flush_lsn, received_lsn, replay_lsn, lag_bytes and
                 lag_ms (of readers, behind the VDL), bundle_end_lsn,
                 timeline, postgres_pid, postgres_port, shipped_bytes,
                 links (node, state, scl, ack_latency_us)
    `process` is running, paused, dead or stopped; null of another machine's.
    LSNs are text as PostgreSQL writes them. What is not known, as when the
    control plane is down, is null.
    """
    import asyncio
    from contextlib import suppress

    from rich.console import Console

    from boreal.command import status as found
    from boreal.command.status_view import to_table
    from boreal.command.watch import watch as show

    if watch:
        with suppress(KeyboardInterrupt):
            asyncio.run(show(lambda: _place(data_dir), Console()))
        return
    report = found.to_json(asyncio.run(found.gather(_place(data_dir))))
    if as_json:
        import json

        click.echo(json.dumps(report, indent=2))
    else:
        Console().print(to_table(report))


@main.command()
@_data_dir_option
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens.")
@click.option("--json", "as_json", is_flag=True, help="One object a line, for programs.")
def events(data_dir: Path, follow: bool, as_json: bool) -> None:
    """List what happened: failovers with their durations, instances that came and went."""
    import asyncio
    from contextlib import suppress

    from rich.console import Console

    from boreal.command import events as happened

    place = _place(data_dir)
    console = Console(soft_wrap=True)

    def tell(event: control_pb2.Event) -> None:
        if as_json:
            click.echo(happened.to_json(event))
        else:
            console.print(happened.to_line(event))

    last = asyncio.run(happened.show(place, tell))
    if follow:
        with suppress(KeyboardInterrupt):
            asyncio.run(happened.follow(place, last, tell))


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


def _target_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """`--reader` or `--instance`: whom to connect to, if not the writer endpoint."""
    reader = click.option("--reader", is_flag=True, help="The reader endpoint.")
    instance = click.option("--instance", metavar="NAME", help="This instance, whatever its role.")
    return reader(instance(verb))


def _target(config: ClusterConfig, reader: bool, instance: str | None) -> tuple[int, str]:
    """The port and the connection string asked for."""
    if reader and instance:
        raise BadUsage("--reader and --instance name two targets; use one of them")
    if instance:
        return config.instance(instance).postgres_port, config.instance_dsn(instance)
    if reader:
        return config.reader_port, config.reader_dsn
    return config.postgres_port, config.dsn


@main.command(context_settings={"ignore_unknown_options": True})
@_data_dir_option
@_target_options
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def psql(data_dir: Path, reader: bool, instance: str | None, arguments: tuple[str, ...]) -> None:
    """Open psql at the writer as the master user; ARGUMENTS go to psql."""
    from boreal.command.card import psql_program

    config = cluster.load(data_dir)
    port, _ = _target(config, reader, instance)
    program = str(psql_program())
    environment = {
        **os.environ,
        "PGHOST": cluster.HOST,
        "PGPORT": str(port),
        "PGUSER": cluster.MASTER_USER,
        "PGDATABASE": cluster.DATABASE,
        "PGPASSWORD": config.master_password,  # not an argument: those everybody can see
    }
    os.execve(program, [program, *arguments], environment)  # noqa: S606 - psql takes over


@main.command()
@_data_dir_option
@_target_options
def dsn(data_dir: Path, reader: bool, instance: str | None) -> None:
    """Print a connection string: the writer endpoint's."""
    _, dsn = _target(cluster.load(data_dir), reader, instance)
    click.echo(dsn)


# --- instances -----------------------------------------------------------------------------------


@main.command()
@_data_dir_option
@click.option(
    "--tier",
    type=click.IntRange(0, cluster.LAST_TIER),
    default=cluster.DEFAULT_TIER,
    show_default=True,
    help="Who takes over when the writer fails: 0 before 1, and so on.",
)
def add_reader(data_dir: Path, tier: int) -> None:
    """Add an instance; return when it can be read from."""
    from boreal.command.card import Terminal
    from boreal.command.instances import add_reader as run

    config, entry = run(data_dir, tier, Terminal())
    click.echo(config.instance_dsn(entry.name))


@main.command()
@_data_dir_option
@click.argument("name")
def remove_reader(data_dir: Path, name: str) -> None:
    """Stop an instance that is not the writer, for good."""
    from boreal.command.card import Terminal
    from boreal.command.instances import remove_reader as run

    run(data_dir, name, Terminal())


@main.command()
@_data_dir_option
@click.option("--target", default="", metavar="NAME", help="The instance that is to be the writer.")
def failover(data_dir: Path, target: str) -> None:
    """Make another instance the writer, losing nothing; return when it serves.

    Without --target it is the reader of the lowest tier, and of those the one furthest ahead.
    """
    import asyncio

    from boreal.command.instances import fail_over

    done = asyncio.run(fail_over(_place(data_dir), target))
    click.echo(
        f"{done.writer} is the writer, epoch {done.epoch}; it took {done.took_ms / 1000:.2f} s"
    )


@main.command()
@_data_dir_option
@click.option(
    "--readers",
    type=click.IntRange(0, cluster.MAX_INSTANCES - 1),
    default=0,
    show_default=True,
    help="Wait for so many readers, too.",
)
@click.option("--timeout", "timeout_s", type=click.FloatRange(0), default=180, show_default=True)
def wait(data_dir: Path, readers: int, timeout_s: float) -> None:
    """Return when SQL is served: there is a writer that takes clients."""
    import asyncio

    from boreal.command.served import await_served

    click.echo(asyncio.run(await_served(_place(data_dir), readers, timeout_s)))


# --- certificates --------------------------------------------------------------------------------


@main.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", "names", multiple=True, required=True, help="A process: sn-1, db-1, ...")
@click.option(
    "--server-name",
    "server_names",
    multiple=True,
    metavar="HOST",
    help="A name or an address by which clients know the hosts; besides this machine's.",
)
def certificates(directory: Path, names: tuple[str, ...], server_names: tuple[str, ...]) -> None:
    """Make certificates for processes that run elsewhere, and the authority if there is none.

    DIRECTORY/NAME is what process NAME takes as --tls-dir; a name `boreal` is for this command.
    What is there and valid for 30 more days stays. Keep DIRECTORY/ca.key where nobody else reads
    it: it makes members of the cluster. DIRECTORY/ca.crt is for clients, as their sslrootcert.
    """
    from boreal.certificates import LOCAL_NAMES, issue

    made = issue(directory, names, server_names=(*LOCAL_NAMES, *server_names))
    kept = [name for name in names if name not in made]
    if made:
        click.echo(f"made {', '.join(made)} in {directory}")
    if kept:
        click.echo(f"{', '.join(kept)}: still good")


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
    """Kill -9 a process and its children, as a crash would.

    NAME is sn-1 to sn-6, db-1 and so on, endpoints, or control.
    """
    from boreal.command.roster import check_name
    from boreal.processes import LocalProcesses

    config = cluster.load(data_dir)
    pid = LocalProcesses(data_dir).kill(check_name(config, name))
    click.echo(f"killed {name}, pid {pid}. {_after_kill(config, name)}")


def _after_kill(config: ClusterConfig, name: str) -> str:
    if name == cluster.CONTROL:
        return "Reads and writes go on without it. Start it with `boreal restart control`"
    if name == cluster.ENDPOINTS:
        return "It comes back by itself; connections that are open are not touched"
    if name not in config.instance_names:
        return f"Start it with `boreal restart {name}`; it will catch up by itself"
    if len(config.compute) == 1:
        return "It comes back by itself, with a new epoch: see `boreal status --watch`"
    return (
        "It comes back by itself, as a reader; if it was the writer, another instance takes over: "
        "see `boreal status --watch`"
    )


@main.command()
@_data_dir_option
@click.argument("name")
def pause(data_dir: Path, name: str) -> None:
    """Freeze a process and its children (SIGSTOP), as a hung machine would.

    A frozen writer is replaced after a moment, if there is a reader.
    """
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
    """Stop a process if it runs, start it, and wait until it does its work.

    An instance does when it takes clients. The writer comes back as a reader if another instance
    took over meanwhile; clients notice less if `boreal failover` moved its role before.
    """
    from boreal.command.card import Terminal
    from boreal.command.lifecycle import restart as run
    from boreal.command.roster import check_name

    config = cluster.load(data_dir)
    run(config, check_name(config, name), Terminal())


@main.command()
@click.argument("address", metavar="HOST:PORT")
@click.option("--ready", is_flag=True, help="Whether it does its work, not only whether it lives.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0), default=5, show_default=True)
def health(address: str, ready: bool, timeout_s: float) -> None:
    """Ask one process how it is, by gRPC's health protocol: the probe of containers.

    Succeeds if it answers well. A storage node is asked at its log port, an instance at its
    agent's, the endpoints at their --health-port. `boreal --tls-dir DIR health` says who asks.
    """
    import asyncio

    from boreal.rpc.health import check

    told: _Told = click.get_current_context().find_root().obj
    identity = told.identity()
    asyncio.run(check(address, ready=ready, within_s=timeout_s, identity=identity))


if __name__ == "__main__":
    main()
