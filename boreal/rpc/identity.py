"""Who a process is to the others of its cluster: a certificate, and the authority that signed it.

Both sides of every connection between our processes show one (mutual TLS). That the cluster's own
authority signed it is what counts, not the host it comes from: processes move. So every certificate
carries the name PEER_NAME, and whoever calls expects that one (boreal/certificates.py issues them).
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import grpc

from boreal.errors import BadUsage

PEER_NAME = "boreal"
"""The DNS name in every certificate, whatever host it is used on."""
AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE = "ca.crt", "tls.crt", "tls.key"
"""The last two named as in a Kubernetes TLS secret."""

_REMEDY = "`boreal certificates` makes what is needed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a process shows and whom it trusts, as read from its directory once."""

    directory: Path
    _authority: bytes = field(repr=False)
    _certificate: bytes = field(repr=False)
    _key: bytes = field(repr=False)
    _server: ssl.SSLContext = field(repr=False)
    _client: ssl.SSLContext = field(repr=False)
    _public: ssl.SSLContext = field(repr=False)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read ca.crt, tls.crt and tls.key; BadUsage, with the remedy, where that cannot be."""
        try:
            authority, certificate, key = (
                (directory / name).read_bytes()
                for name in (AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE)
            )
            return cls(
                directory=directory,
                _authority=authority,
                _certificate=certificate,
                _key=key,
                _server=_mutual(directory, ssl.PROTOCOL_TLS_SERVER),
                _client=_mutual(directory, ssl.PROTOCOL_TLS_CLIENT),
                _public=_context(directory, ssl.PROTOCOL_TLS_SERVER),
            )
        except ssl.SSLError as error:
            raise BadUsage(
                f"the files in {directory} are no certificate with its key and authority "
                f"({error.reason or error}); {_REMEDY}"
            ) from error
        except OSError as error:
            raise BadUsage(
                f"cannot read {error.filename or directory}: {error.strerror}; {_REMEDY}"
            ) from error

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server; callers without a certificate of this authority are refused."""
        return grpc.ssl_server_credentials(
            [(self._key, self._certificate)],
            root_certificates=self._authority,
            require_client_auth=True,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a gRPC channel; expect PEER_NAME of the server."""
        return grpc.ssl_channel_credentials(self._authority, self._key, self._certificate)

    def server_context(self) -> ssl.SSLContext:
        """For a server of another protocol; the same callers are refused."""
        return self._server

    def client_context(self) -> ssl.SSLContext:
        """For a connection of another protocol; expect PEER_NAME of the server."""
        return self._client

    def public_context(self) -> ssl.SSLContext:
        """For a server that anybody may call: PostgreSQL's clients have no certificates."""
        return self._public


def _mutual(directory: Path, protocol: int) -> ssl.SSLContext:
    context = _context(directory, protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # both ends are ours
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(directory / AUTHORITY_FILE)
    return context


def _context(directory: Path, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.load_cert_chain(directory / CERTIFICATE_FILE, directory / KEY_FILE)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if protocol is ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # connections last; none is ever resumed
    return context
