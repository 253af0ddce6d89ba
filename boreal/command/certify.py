"""Certificates for the processes of a local cluster."""

from __future__ import annotations

from boreal.cluster import COMMAND, ClusterConfig


def certify(config: ClusterConfig) -> None:
    """See to it that every process has a certificate with some time left, and the command too.

    Those that run go on with the one they started with.
    """
    if config.insecure:
        return
    from boreal.certificates import issue  # takes a tenth of a second

    issue(config.tls_dir, (COMMAND, *config.names))
