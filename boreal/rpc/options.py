"""How every process is told who it is: `--tls-dir DIR`, or in so many words `--insecure`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from boreal.errors import BadUsage
from boreal.rpc.edge import use_identity
from boreal.rpc.identity import Identity

TLS_DIR_HELP = "Holds ca.crt, tls.crt and tls.key: who this process is, and whom it trusts."
INSECURE_HELP = "Talk to the others unencrypted, and to anybody who comes."


def identity_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command the two options, as `tls_dir` and `insecure`."""
    tls_dir = click.option(
        "--tls-dir", type=click.Path(path_type=Path, file_okay=False), help=TLS_DIR_HELP
    )
    insecure = click.option("--insecure", is_flag=True, help=INSECURE_HELP)
    return tls_dir(insecure(command))


def identity_of(tls_dir: Path | None, *, insecure: bool) -> Identity | None:
    """Who the options say; None: nobody. BadUsage unless they say one thing."""
    if (tls_dir is None) is not insecure:
        raise BadUsage(
            "say who this process is with --tls-dir DIR (`boreal certificates` makes one), or say "
            "--insecure; one of the two"
        )
    return None if tls_dir is None else Identity.load(tls_dir)


def take_identity(tls_dir: Path | None, *, insecure: bool) -> Identity | None:
    """Be from now on who the options say."""
    identity = identity_of(tls_dir, insecure=insecure)
    use_identity(identity)
    return identity
