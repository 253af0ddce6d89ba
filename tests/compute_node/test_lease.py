"""Goal: the word that PostgreSQL's processes look at tells the lease, and holds back without one.

Method: the agent's side of the file, read as the shim does; a second mapping sees every change.
"""

from __future__ import annotations

import time
from pathlib import Path

from boreal.engine import Account
from boreal.quorum.lease import DRIFT, LEASE_S
from compute_node.lease import HELD_BACK, NOT_NEEDED, Lease


def word(socket: Path) -> int:
    """Until when it is held, as the shim reads it: 8 bytes, little-endian."""
    return int.from_bytes(socket.with_name(f"{socket.name}.lease").read_bytes()[:8], "little")


def lease_of(tmp_path: Path) -> tuple[Lease, Path]:
    socket = tmp_path / "pages"
    return Lease(socket, Account.unprivileged()), socket


def test_a_reader_needs_none(tmp_path: Path) -> None:
    lease, socket = lease_of(tmp_path)
    assert word(socket) == NOT_NEEDED
    assert lease.held(time.monotonic)
    lease.close()


def test_a_writer_without_contacts_is_held_back(tmp_path: Path) -> None:
    lease, socket = lease_of(tmp_path)
    lease.hold_back()
    lease.renew([5.0, 5.0])
    assert word(socket) == HELD_BACK
    assert not lease.held(time.monotonic)


def test_the_lease_reaches_as_far_as_the_contacts_say_and_never_back(tmp_path: Path) -> None:
    lease, socket = lease_of(tmp_path)
    lease.hold_back()
    lease.renew([100.0, 101.0, 102.0])
    until_ns = int((100.0 + LEASE_S * (1 - DRIFT)) * 1e9)
    assert word(socket) == until_ns
    assert lease.held(lambda: 101.0)
    assert not lease.held(lambda: 102.0)
    lease.renew([90.0, 91.0, 92.0])
    assert word(socket) == until_ns
    lease.renew([100.0, 101.0, 102.0, 103.0])
    assert word(socket) == until_ns + 1_000_000_000


def test_draining_is_told_beside_it(tmp_path: Path) -> None:
    lease, socket = lease_of(tmp_path)
    lease.drain()
    lease.renew([100.0, 101.0, 102.0])
    assert word(socket) > HELD_BACK
    assert socket.with_name("pages.lease").read_bytes()[8:] == (1).to_bytes(8, "little")
