"""The cluster's authority and its certificates: what is made, what is kept, what is made anew.

Method: the real library into a temporary directory, at moments the test chooses. (That processes
accept these and no others: tests/cluster/test_tls.py.)
"""

from __future__ import annotations

import shutil
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from boreal.certificates import AUTHORITY_LIFE, LIFE, LOCAL_NAMES, RENEW_WITHIN, issue
from boreal.command.main import main
from boreal.errors import BadUsage
from boreal.rpc.identity import Identity

_NOW = datetime(2026, 11, 23, tzinfo=UTC)
_DAY = timedelta(days=1)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def made(directory: Path, *names: str, at: datetime = _NOW) -> tuple[str, ...]:
    return issue(directory, names, clock=lambda: at)


def test_each_process_has_its_own_and_all_trust_one(tmp_path: Path) -> None:
    assert made(tmp_path, "sn-1", "db-1") == ("sn-1", "db-1")
    authority = certificate(tmp_path / "ca.crt")
    serials = set()
    for name in ("sn-1", "db-1"):
        own = certificate(tmp_path / name / "tls.crt")
        own.verify_directly_issued_by(authority)
        serials.add(own.serial_number)
        assert (tmp_path / name / "ca.crt").read_bytes() == (tmp_path / "ca.crt").read_bytes()
        names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["boreal", "localhost"]
        assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == [
            "127.0.0.1",
            "::1",
        ]
        usage = own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
        limits = own.extensions.get_extension_for_class(x509.BasicConstraints).value
        assert not limits.ca
        assert own.not_valid_after_utc == _NOW + LIFE
        Identity.load(tmp_path / name)
    assert len(serials) == 2


def test_only_the_owner_reads_keys_and_everybody_the_authority(tmp_path: Path) -> None:
    directory = tmp_path / "tls"
    made(directory, "sn-1")
    modes = {
        str(path.relative_to(directory)): oct(path.stat().st_mode & 0o777)
        for path in (directory, *directory.rglob("*"))
    }
    assert modes == {
        ".": "0o755",
        "ca.crt": "0o644",
        "ca.key": "0o600",
        "sn-1": "0o700",
        "sn-1/ca.crt": "0o644",
        "sn-1/tls.crt": "0o644",
        "sn-1/tls.key": "0o600",
    }


def content(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_is_good_stays_as_it_is(tmp_path: Path) -> None:
    made(tmp_path, "sn-1")
    before = content(tmp_path)
    assert made(tmp_path, "sn-1", at=_NOW + LIFE - RENEW_WITHIN) == ()
    assert content(tmp_path) == before
    assert made(tmp_path, "sn-1", "sn-2") == ("sn-2",)
    assert content(tmp_path / "sn-1").items() <= before.items()


def test_one_with_less_than_thirty_days_left_is_made_anew(tmp_path: Path) -> None:
    made(tmp_path, "sn-1")
    before = content(tmp_path)
    late = _NOW + LIFE - timedelta(days=29)
    assert made(tmp_path, "sn-1", at=late) == ("sn-1",)
    after = content(tmp_path)
    changed = {str(path.relative_to(tmp_path)) for path in after if after[path] != before[path]}
    assert changed == {"sn-1/tls.crt", "sn-1/tls.key"}
    assert certificate(tmp_path / "sn-1/tls.crt").not_valid_after_utc == late + LIFE
    Identity.load(tmp_path / "sn-1")


def test_an_authority_that_ends_goes_on_under_the_same_key(tmp_path: Path) -> None:
    made(tmp_path, "sn-1")
    late = _NOW + AUTHORITY_LIFE - 40 * _DAY
    assert made(tmp_path, "sn-1", at=late) == ("sn-1",)  # it cannot outlive the authority
    own = certificate(tmp_path / "sn-1/tls.crt")
    before = certificate(tmp_path / "ca.crt")
    assert own.not_valid_after_utc == before.not_valid_after_utc
    key = (tmp_path / "ca.key").read_bytes()
    later = late + 15 * _DAY
    assert made(tmp_path, "sn-1", at=later) == ("sn-1",)
    assert (tmp_path / "ca.key").read_bytes() == key
    authority = certificate(tmp_path / "ca.crt")
    assert authority.not_valid_after_utc == later + AUTHORITY_LIFE
    assert (tmp_path / "sn-1/ca.crt").read_bytes() == (tmp_path / "ca.crt").read_bytes()
    own.verify_directly_issued_by(authority)  # one still in use
    certificate(tmp_path / "sn-1/tls.crt").verify_directly_issued_by(before)


def test_other_host_names_make_it_anew(tmp_path: Path) -> None:
    made(tmp_path, "db-1")
    names = (*LOCAL_NAMES, "db.example.org", "10.1.2.3", "*.example.org")
    assert issue(tmp_path, ["db-1"], server_names=names, clock=lambda: _NOW) == ("db-1",)
    assert issue(tmp_path, ["db-1"], server_names=names, clock=lambda: _NOW) == ()
    with pytest.raises(BadUsage, match="neither a host name"):
        issue(tmp_path, ["db-1"], server_names=["zürich"])


@pytest.mark.parametrize("lost", ["ca.crt", "sn-1/tls.crt", "sn-1/tls.key", "sn-1/ca.crt"])
def test_what_is_lost_or_does_not_fit_is_made_anew(tmp_path: Path, lost: str) -> None:
    made(tmp_path, "sn-1", "sn-2")
    (tmp_path / lost).unlink()
    made(tmp_path, "sn-1", "sn-2")
    for name in ("sn-1", "sn-2"):
        Identity.load(tmp_path / name)
        own = certificate(tmp_path / name / "tls.crt")
        own.verify_directly_issued_by(certificate(tmp_path / name / "ca.crt"))
    shutil.copy(tmp_path / "sn-2/tls.key", tmp_path / "sn-1/tls.key")  # as interrupted in between
    assert made(tmp_path, "sn-1", "sn-2") == ("sn-1",)


def test_another_authority_replaces_what_the_former_signed(tmp_path: Path) -> None:
    made(tmp_path, "sn-1")
    (tmp_path / "ca.key").unlink()
    assert made(tmp_path, "sn-1") == ("sn-1",)
    own = certificate(tmp_path / "sn-1/tls.crt")
    own.verify_directly_issued_by(certificate(tmp_path / "ca.crt"))


def test_what_is_not_ours_is_refused_with_a_remedy(tmp_path: Path) -> None:
    made(tmp_path, "sn-1")
    (tmp_path / "ca.crt").write_text("something else")
    with pytest.raises(BadUsage, match="remove it"):
        made(tmp_path, "sn-1")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadUsage, match="cannot keep certificates"):
        made(tmp_path / "file", "sn-1")


def test_the_command_makes_them_elsewhere(tmp_path: Path) -> None:
    arguments = ["certificates", str(tmp_path), "--name", "sn-1", "--name", "boreal"]
    for said in ("made sn-1, boreal in", "sn-1, boreal: still good"):
        result = CliRunner().invoke(main, [*arguments, "--server-name", "pg.example.org"])
        assert result.exit_code == 0
        assert said in result.output
    own = certificate(tmp_path / "sn-1" / "tls.crt")
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "pg.example.org" in names.get_values_for_type(x509.DNSName)
    key = load_pem_private_key((tmp_path / "sn-1/tls.key").read_bytes(), password=None)
    assert key.public_key() == own.public_key()


def test_an_identity_that_cannot_be_read_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BadUsage, match=r"ca\.crt.*boreal certificates"):
        Identity.load(tmp_path / "nowhere")
    made(tmp_path, "sn-1", "sn-2")
    shutil.copy(tmp_path / "sn-2/tls.key", tmp_path / "sn-1/tls.key")
    with pytest.raises(BadUsage, match=r"MISMATCH.*boreal certificates"):
        Identity.load(tmp_path / "sn-1")


def test_a_key_is_not_shown_by_mistake(tmp_path: Path) -> None:
    made(tmp_path, "sn-1")
    assert "PRIVATE" not in repr(Identity.load(tmp_path / "sn-1"))


def test_both_ends_must_show_a_certificate(tmp_path: Path) -> None:
    made(tmp_path, "sn-1")
    identity = Identity.load(tmp_path / "sn-1")
    assert identity.server_context().verify_mode is ssl.CERT_REQUIRED
    assert identity.client_context().verify_mode is ssl.CERT_REQUIRED
    assert identity.client_context().check_hostname
    assert identity.public_context().verify_mode is ssl.CERT_NONE
