"""A cluster's own certificate authority, and a certificate for each of its processes.

    DIR/ca.crt            whom everybody trusts; clients name it as `sslrootcert`
    DIR/ca.key            signs; only whoever issues needs it
    DIR/NAME/ca.crt       the same as above, so that a process needs one directory
    DIR/NAME/tls.crt      its certificate: to listen with, and to call others with
    DIR/NAME/tls.key      the key to it

The file names in DIR/NAME are those of a Kubernetes TLS secret. Every certificate carries the name
`boreal`, which our processes expect of one another (boreal.rpc.identity), and the names by which
clients know the hosts. Keys are elliptic (P-256), made where they are kept, and never replaced by
an equal one: what is fresh, signed by this authority and carries the names that were asked for
stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from boreal.errors import BadUsage
from boreal.files import write_atomic
from boreal.rpc.identity import AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE, PEER_NAME

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
"""By which clients know this machine."""
RENEW_WITHIN = timedelta(days=30)
"""What has less time left is issued anew."""
AUTHORITY_LIFE = timedelta(days=3650)
LIFE = timedelta(days=824)
"""From its making. With _CLOCK_SKEW, the most that all clients' TLS libraries accept of a server
(Apple's bound, 825 days)."""

_CLOCK_SKEW = timedelta(days=1)
"""Clocks of other machines may be behind."""
_AUTHORITY_KEY_FILE = "ca.key"
_READABLE_BY_ALL = 0o644


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """Who signs."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def issue(
    directory: Path,
    names: Iterable[str],
    *,
    server_names: Iterable[str] = LOCAL_NAMES,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> tuple[str, ...]:
    """See to it that each of `names` has a valid certificate in `directory`; who got a new one.

    Makes the authority if there is none. `server_names` are host names and IP addresses. Raises
    BadUsage where the files cannot be read or written, or are none of ours.
    """
    now = clock()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)  # clients read ca.crt; the keys are closed by themselves
        authority = _authority(directory, now)
        wanted = _alternative_names(server_names)
        return tuple(name for name in names if _issue(authority, directory / name, wanted, now))
    except OSError as error:
        raise BadUsage(
            f"cannot keep certificates in {directory}: {error.strerror or error}; choose a "
            "directory that is yours"
        ) from error
    except ValueError as error:
        raise BadUsage(
            f"{directory} holds what is no certificate or key of ours ({error}); remove it, and "
            "all certificates are made anew"
        ) from error


# --- the authority -------------------------------------------------------------------------------


def _authority(directory: Path, now: datetime) -> Authority:
    """The authority of `directory`, made if there is none.

    One that ends soon goes on under the same key, so that what it signed before stays valid.
    """
    key = _read_key(directory / _AUTHORITY_KEY_FILE)
    if key is None:
        key = ec.generate_private_key(ec.SECP256R1())
        _write_key(directory / _AUTHORITY_KEY_FILE, key)
    certificate = _read_certificate(directory / AUTHORITY_FILE)
    if certificate is None or not _lasts(certificate, now) or not _fits(certificate, key):
        certificate = _sign_authority(key, now)
        _write_certificate(directory / AUTHORITY_FILE, certificate)
    return Authority(certificate=certificate, key=key)


def _sign_authority(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    subject = _named("Boreal cluster CA")
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        _unsigned(subject, subject, key, now, now + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )


# --- one process ---------------------------------------------------------------------------------


def _issue(
    authority: Authority, directory: Path, wanted: x509.SubjectAlternativeName, now: datetime
) -> bool:
    """Make what is missing or out of date; whether the certificate was."""
    directory.mkdir(exist_ok=True)
    directory.chmod(0o700)
    if _read_certificate(directory / AUTHORITY_FILE) != authority.certificate:
        _write_certificate(directory / AUTHORITY_FILE, authority.certificate)
    key = _read_key(directory / KEY_FILE)
    certificate = _read_certificate(directory / CERTIFICATE_FILE)
    if (
        key is not None
        and certificate is not None
        and _fits(certificate, key)
        and _lasts(certificate, now)
        and _signed_by(authority, certificate)
        and certificate.extensions.get_extension_for_class(type(wanted)).value == wanted
    ):
        return False
    key = ec.generate_private_key(ec.SECP256R1())
    # The key first: interrupted in between, the two do not fit, and the next call makes both anew.
    _write_key(directory / KEY_FILE, key)
    fresh = _sign(authority, key, directory.name, wanted, now)
    _write_certificate(directory / CERTIFICATE_FILE, fresh)
    return True


def _sign(
    authority: Authority,
    key: ec.EllipticCurvePrivateKey,
    name: str,
    alternatives: x509.SubjectAlternativeName,
    now: datetime,
) -> x509.Certificate:
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    until = min(now + LIFE, authority.certificate.not_valid_after_utc)
    return (
        _unsigned(_named(name), authority.certificate.subject, key, now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(both, critical=False)
        .add_extension(alternatives, critical=False)
        .add_extension(signer, critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def _alternative_names(server_names: Iterable[str]) -> x509.SubjectAlternativeName:
    names = dict.fromkeys((PEER_NAME, *server_names))
    return x509.SubjectAlternativeName([_general_name(name) for name in names])


def _general_name(name: str) -> x509.GeneralName:
    with suppress(ValueError):  # no address, so a name
        return x509.IPAddress(ip_address(name))
    try:
        return x509.DNSName(name)
    except ValueError:
        raise BadUsage(
            f"{name!r} is neither a host name nor an address; one with other letters than ASCII's "
            "is written in its xn-- form"
        ) from None


# --- certificates and keys -----------------------------------------------------------------------


def _unsigned(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    now: datetime,
    until: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(until)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _lasts(certificate: x509.Certificate, now: datetime) -> bool:
    return certificate.not_valid_after_utc - now >= RENEW_WITHIN


def _fits(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> bool:
    return bool(certificate.public_key() == key.public_key())


def _signed_by(authority: Authority, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority.certificate)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


# --- files ---------------------------------------------------------------------------------------


def _read_certificate(path: Path) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        return None


def _write_certificate(path: Path, certificate: x509.Certificate) -> None:
    write_atomic(path, certificate.public_bytes(Encoding.PEM).decode())
    path.chmod(_READABLE_BY_ALL)


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey | None:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadUsage(f"{path} is no elliptic-curve key; remove it, and it is made anew")
    return key


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_atomic(path, pem.decode())
