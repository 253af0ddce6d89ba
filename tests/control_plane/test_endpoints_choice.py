"""What the endpoints decide, as values: whom a connection goes to, and what a client wants."""

from __future__ import annotations

import struct

import pytest

from boreal.errors import MalformedRequest
from boreal.rpc import control_pb2
from boreal.types import InstanceName
from control_plane.endpoints.choice import Door, Endpoint, Route, choose, next_rested
from control_plane.endpoints.directory import Directory
from control_plane.endpoints.greeting import Greeting, greeting_of, refusal
from control_plane.endpoints.watch import routes_from_wire


def route(name: str, *, writer: bool = False) -> Route:
    return Route(instance=InstanceName(name), writer=writer, host="h", port=1, handover=f"/{name}")


WRITER = route("db-1", writer=True)
READERS = (route("db-2"), route("db-3"), route("db-4"))
ALL = (WRITER, *READERS)


NOW = 10.0


def chosen(endpoint: Endpoint, *routes: Route, **doors: Door) -> str | None:
    """The instance chosen now; doors are given by name, with _ for -."""
    known = {InstanceName(name.replace("_", "-")): door for name, door in doors.items()}
    found = choose(endpoint, routes, known, NOW)
    return found.instance if found else None


def test_the_writers_endpoint_leads_to_the_writer_alone() -> None:
    assert chosen(Endpoint.WRITER, *ALL) == "db-1"
    assert chosen(Endpoint.WRITER, *READERS) is None
    assert chosen(Endpoint.WRITER, *ALL, db_1=Door(rests_until=10.5)) is None
    assert chosen(Endpoint.WRITER, *ALL, db_1=Door(rests_until=10.0)) == "db-1"


def test_the_readers_endpoint_leads_to_the_one_that_waited_longest() -> None:
    doors = {"db_2": Door(turn=5), "db_3": Door(turn=3), "db_4": Door(turn=4)}
    assert chosen(Endpoint.READER, *ALL, **doors) == "db-3"
    assert chosen(Endpoint.READER, *ALL, **{**doors, "db_4": Door(turn=0)}) == "db-4"


def test_a_reader_that_has_not_answered_comes_last() -> None:
    doors = {"db_2": Door(turn=1, offers=1), "db_3": Door(turn=2), "db_4": Door(turn=3, offers=2)}
    assert chosen(Endpoint.READER, *ALL, **doors) == "db-3"
    assert chosen(Endpoint.READER, WRITER, READERS[0], **doors) == "db-2"


def test_the_writer_stands_in_when_no_reader_can_be_had() -> None:
    resting = Door(rests_until=11.0)
    assert chosen(Endpoint.READER, WRITER) == "db-1"
    assert chosen(Endpoint.READER, *ALL, db_2=resting, db_3=resting, db_4=resting) == "db-1"
    assert chosen(Endpoint.READER, *ALL, db_2=resting, db_3=resting) == "db-4"
    assert chosen(Endpoint.READER) is None


def test_the_next_that_has_rested() -> None:
    doors = {InstanceName("db-2"): Door(rests_until=12.0), InstanceName("db-3"): Door()}
    assert next_rested(ALL, doors, 10.0) == 12.0
    assert next_rested(ALL, doors, 12.0) is None
    assert next_rested((WRITER,), doors, 10.0) is None


async def test_connections_are_spread_evenly() -> None:
    directory = Directory(lambda: 0.0)
    directory.replace_routes(ALL)
    names = []
    for _ in range(9):
        found = directory.choose(Endpoint.READER)
        assert found is not None
        async with directory.turn(found):
            names.append(found.instance)
    assert sorted(names) == sorted([reader.instance for reader in READERS] * 3)
    assert len(set(names[:3])) == 3


async def test_an_instance_that_left_and_came_back_is_well_rested() -> None:
    directory = Directory(lambda: 0.0)
    directory.replace_routes((WRITER,))
    directory.rest(WRITER, 1.0)
    assert directory.choose(Endpoint.WRITER) is None
    assert directory.next_rested() == 1.0
    directory.replace_routes(())
    directory.replace_routes((WRITER,))
    assert directory.choose(Endpoint.WRITER) == WRITER


async def test_who_was_routed_to_is_remembered_within_bounds() -> None:
    directory = Directory(lambda: 0.0)
    for number in range(200):
        directory.replace_routes((route(f"db-{number}"),))
    assert len(directory.known) == 64


def test_a_routing_that_cannot_be_is_refused() -> None:
    def wire(*routes: tuple[str, bool]) -> control_pb2.Routing:
        return control_pb2.Routing(
            routes=[control_pb2.Route(instance=name, writer=writer) for name, writer in routes]
        )

    assert [found.writer for found in routes_from_wire(wire(("a", True), ("b", False)))] == [
        True,
        False,
    ]
    for routing in (wire(("a", True), ("b", True)), wire(("a", False), ("a", False))):
        with pytest.raises(MalformedRequest):
            routes_from_wire(routing)


@pytest.mark.parametrize(
    ("first", "greeting"),
    [
        (struct.pack("!II", 8, 80877103), Greeting.TLS),
        (struct.pack("!II", 8, 80877104), Greeting.GSSAPI),
        (struct.pack("!IIII", 16, 80877102, 4711, 1), Greeting.CANCEL),
        (struct.pack("!II", 16, 80877102), Greeting.CANCEL),
        (struct.pack("!II", 20, 80877102), Greeting.SESSION),
        (struct.pack("!II", 9, 80877103), Greeting.SESSION),
        (struct.pack("!II", 100, 3 << 16), Greeting.SESSION),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", Greeting.SESSION),
        (b"GET / HT", Greeting.SESSION),
        (b"", Greeting.SESSION),
    ],
)
def test_greetings_are_told_by_their_first_bytes(first: bytes, greeting: Greeting) -> None:
    assert greeting_of(first) is greeting


def test_a_refusal_is_postgresqls_own_message() -> None:
    message = refusal("57P03", "no writer")
    assert message[:1] == b"E"
    assert struct.unpack("!I", message[1:5]) == (len(message) - 1,)
    assert message[5:] == b"SFATAL\0VFATAL\0C57P03\0Mno writer\0\0"
