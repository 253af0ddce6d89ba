"""Goal: the VDL is exactly what a write quorum holds; no node, dead, slow or behind, holds up the
others or lets memory grow; a newer writer stops this one.

Method: the shipper over real sockets against six nodes in miniature (`storage_fake`: real segment
rules, log in memory) that are killed, paused, restarted and fenced; the pure part (window, batches,
VDL) under hypothesis against a plain model.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boreal.errors import BelowLogStart, CorruptWal, Internal, StaleEpoch
from boreal.frames import MAX_APPEND_BYTES, FrameReader
from boreal.quorum import SIX_WAY, DurabilityTracker, Lineage
from boreal.rpc import storage_pb2
from boreal.types import WAL_SEGMENT_BYTES, Epoch, Lsn, NodeName, VolumeId
from compute_node.shipper import LinkState, LinkTiming, Shipper
from compute_node.shipping.outbox import SLACK_BYTES, Outbox
from compute_node.shipping.window import LogWindow
from tests.compute_node.storage_fake import FakeNode

START = Lsn(WAL_SEGMENT_BYTES)
FORMER = Lineage.of([(1, START)])
LINEAGE = FORMER.extended(Epoch(2), START)
MIB = 1024 * 1024


async def until(condition: Callable[[], bool], limit_s: float = 5.0) -> float:
    """Wait for a condition; how long it took."""
    clock = asyncio.get_running_loop().time
    start = clock()
    while not condition():
        assert clock() - start < limit_s, "the condition did not come true in time"
        await asyncio.sleep(0.005)
    return clock() - start


@dataclass
class Fleet:
    shipper: Shipper
    nodes: list[FakeNode]
    vdls: list[Lsn]
    task: asyncio.Task[None]
    sent: bytearray

    def push(self, data: bytes) -> None:
        self.shipper.push(self.shipper.end, data)
        self.sent += data

    def state_of(self, node: FakeNode) -> LinkState:
        return next(x.state for x in self.shipper.links if x.node == node.address.name)

    async def durable(self, limit_s: float = 5.0) -> float:
        """Wait until all that was pushed is durable."""
        return await until(lambda: self.shipper.vdl == self.shipper.end, limit_s)

    async def everywhere(self) -> None:
        """Wait until every node has everything, and check that it is what was pushed."""
        await until(lambda: all(n.state.scl == self.shipper.end for n in self.nodes), 10)
        assert all(n.log == self.sent for n in self.nodes)


@asynccontextmanager
async def fleet(
    *, window_bytes: int = 64 * MIB, down: int = 0, ack_timeout_s: float = 5.0
) -> AsyncIterator[Fleet]:
    """A shipper and six nodes; the last `down` of them are not started."""
    nodes = [FakeNode(f"sn-{n}", FORMER, START) for n in range(1, 7)]
    vdls: list[Lsn] = []
    shipper = Shipper(
        volume=VolumeId("v"),
        lineage=LINEAGE,
        start=START,
        tracker=DurabilityTracker(SIX_WAY, START),
        members=[node.address for node in nodes],
        on_vdl=vdls.append,
        window_bytes=window_bytes,
        timing=LinkTiming(ack_timeout_s=ack_timeout_s),
    )
    task = asyncio.create_task(shipper.run())
    made = Fleet(shipper, nodes, vdls, task, bytearray())
    try:
        for node in nodes[: 6 - down]:
            await node.start()
        await until(lambda: streaming(shipper) == 6 - down)
        yield made
        assert vdls == sorted(set(vdls)), "the VDL only grows"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for node in nodes:
            await node.kill()


def streaming(shipper: Shipper) -> int:
    return sum(link.state is LinkState.STREAMING for link in shipper.links)


# --- all is well -------------------------------------------------------------------------------


async def test_every_node_gets_every_byte_and_the_vdl_follows() -> None:
    async with fleet() as f:
        seeded = random.Random(1)
        for _ in range(300):
            f.push(seeded.randbytes(seeded.randrange(1, 5000)))
            if seeded.random() < 0.5:
                await asyncio.sleep(0)
        await f.durable()
        await f.everywhere()
        assert f.vdls[-1] == f.shipper.end
        assert f.shipper.shipped_bytes == 6 * len(f.sent)
        assert f.shipper.batches == sum(link.batches for link in f.shipper.links)
        assert all(0 < link.ack_p50_us <= link.ack_p99_us for link in f.shipper.links)
        assert all(link.ack_latency_us > 0 for link in f.shipper.links)
        assert f.shipper.held_everywhere == f.shipper.end


async def test_a_node_that_is_away_holds_what_is_held_everywhere() -> None:
    async with fleet(down=1) as f:
        f.push(b"a" * 1000)
        await f.durable()
        assert f.shipper.held_everywhere is None
        await f.nodes[5].start()
        await f.everywhere()
        await until(lambda: f.shipper.held_everywhere == f.shipper.end)
        held = f.shipper.end
        await f.nodes[0].kill()
        f.push(b"b" * 1000)
        await f.durable()
        assert f.shipper.held_everywhere == held


async def test_an_idle_writer_still_tells_the_last_vdl() -> None:
    async with fleet() as f:
        await until(lambda: len(f.shipper.contacts) == 6)
        before = [len(n.appends) for n in f.nodes]
        f.push(b"x" * 100)
        await until(lambda: all(n.state.vdl == f.shipper.end for n in f.nodes), 1)
        new = [n.appends[at:] for n, at in zip(f.nodes, before, strict=True)]
        assert [size for _, size, _ in new[0]][:2] == [100, 0]  # the bytes, then the VDL


async def test_what_piles_up_during_a_batch_goes_in_the_next_one() -> None:
    async with fleet() as f:
        for _ in range(1000):
            f.push(b"y" * 10)
        await f.everywhere()
        with_data = [[a for a in node.appends if a[1]] for node in f.nodes]
        assert [len(appends) for appends in with_data] == [2] * 6


async def test_a_batch_is_never_larger_than_an_append_may_be() -> None:
    async with fleet() as f:
        for _ in range(5):
            f.push(b"z" * MIB)
        await f.everywhere()
        assert max(size for node in f.nodes for _, size, _ in node.appends) == MAX_APPEND_BYTES


async def test_pgmrpl_travels_with_the_appends() -> None:
    async with fleet() as f:
        f.shipper.set_pgmrpl(Lsn(START + 7))
        f.push(b"x")
        batch = f.shipper._outbox.batch(START)
        (body,) = FrameReader("Append").feed(batch.frame)
        assert storage_pb2.AppendRequest.FromString(body).pgmrpl == START + 7


# --- nodes die, stall, return ------------------------------------------------------------------


async def test_two_dead_nodes_hold_up_nobody() -> None:
    async with fleet() as f:
        await f.nodes[0].kill()
        await f.nodes[1].kill()
        f.push(b"a" * 3000)
        assert await f.durable() < 0.5


async def test_with_three_dead_commits_wait_and_go_on_soon_after_one_is_back() -> None:
    async with fleet() as f:
        for node in f.nodes[:3]:
            await node.kill()
        before = f.shipper.vdl
        f.push(b"b" * 3000)
        await until(lambda: all(n.state.scl == f.shipper.end for n in f.nodes[3:]))
        await asyncio.sleep(1.0)  # long enough for the backoff to reach its cap
        assert f.shipper.vdl == before
        await f.nodes[0].start()
        assert await f.durable() < 2.0
        await f.nodes[1].start()
        await f.nodes[2].start()
        await f.everywhere()


async def test_a_paused_node_gets_one_batch_and_the_rest_when_it_wakes() -> None:
    async with fleet() as f:
        slow = f.nodes[2]
        slow.pause()
        for _ in range(200):
            f.push(b"c" * 10_000)
            await asyncio.sleep(0)
        assert await f.durable() < 1.0
        link = next(x for x in f.shipper.links if x.node == slow.address.name)
        assert link.batches == 1
        slow.resume()
        await f.everywhere()


async def test_a_node_behind_the_window_catches_up_from_its_peers_first() -> None:
    async with fleet(window_bytes=2 * MIB) as f:
        late = f.nodes[5]
        await late.kill()
        for _ in range(20):
            f.push(b"d" * (MIB // 2))
            await f.durable()
        await late.start()
        await until(lambda: f.state_of(late) is LinkState.CATCHING_UP)
        f.push(b"e" * 100)
        assert await f.durable() < 0.5  # nobody waits for it
        late.pull_from(f.nodes[0])
        await until(lambda: f.state_of(late) is LinkState.STREAMING)
        f.push(b"f" * 100)
        await f.everywhere()


async def test_a_paused_node_that_falls_out_of_the_window_is_left_to_its_peers() -> None:
    async with fleet(window_bytes=2 * MIB) as f:
        slow = f.nodes[0]
        slow.pause()
        for _ in range(20):
            f.push(b"g" * (MIB // 2))
            await f.durable()
        slow.resume()
        await until(lambda: f.state_of(slow) is LinkState.CATCHING_UP)
        slow.pull_from(f.nodes[1])
        await f.everywhere()


async def test_a_silent_node_is_given_up_and_found_again() -> None:
    async with fleet(ack_timeout_s=0.2) as f:
        silent = f.nodes[4]
        silent.pause()
        f.push(b"h" * 100)
        await until(lambda: f.state_of(silent) is not LinkState.STREAMING, 2)
        silent.resume()
        await f.everywhere()


async def test_a_node_that_moved_is_found_at_its_new_address() -> None:
    async with fleet(down=1) as f:
        moved = FakeNode("sn-6", FORMER, START)
        await moved.start()
        f.nodes[5] = moved
        f.shipper.set_members([moved.address])
        f.push(b"i" * 100)
        await f.everywhere()


@pytest.mark.parametrize("garbage", [b"\0\0\0\3abc", b"HTTP/1.1 400 Bad Request", b"\0\0\0\0"])
async def test_a_node_that_talks_nonsense_is_dropped_and_tried_again(garbage: bytes) -> None:
    async with fleet() as f:
        for lane in f.nodes[0]._lanes:
            lane.transport.write(garbage)
        await until(lambda: f.state_of(f.nodes[0]) is not LinkState.STREAMING)
        f.push(b"o" * 100)
        await f.everywhere()


# --- bounds ------------------------------------------------------------------------------------


async def test_without_a_quorum_the_window_fills_and_pushes_are_refused() -> None:
    async with fleet(window_bytes=2 * MIB, down=3) as f:
        while not f.shipper.full:
            f.push(b"j" * 100_000)
        assert 2 * MIB <= len(f.sent) < 2 * MIB + 100_000
        room = asyncio.create_task(f.shipper.room())
        with pytest.raises(Internal, match="without a quorum"):
            f.push(b"k" * (MIB + 1))
        f.push(b"l" * (MIB // 2))  # what was in the reader's hands
        await asyncio.sleep(0.05)
        assert not room.done()
        await f.nodes[3].start()
        await asyncio.wait_for(room, 2)
        assert not f.shipper.full
        for node in f.nodes[4:]:
            await node.start()
        await f.durable()


async def test_pushes_overlap_or_leave_gaps() -> None:
    async with fleet() as f:
        f.push(b"0123456789")
        f.shipper.push(Lsn(START + 5), b"56789abc")
        f.sent += b"abc"
        await f.everywhere()
        with pytest.raises(Internal, match="gap"):
            f.shipper.push(Lsn(START + 100), b"x")
        with pytest.raises(CorruptWal, match="other bytes"):
            f.shipper.push(Lsn(START + 5), b"56X89abcdef")
        assert f.shipper.end == START + len(f.sent)


# --- the end of a writer -----------------------------------------------------------------------


async def test_one_stale_epoch_answer_stops_everything() -> None:
    async with fleet() as f:
        f.nodes[3].fence(3)
        f.push(b"m" * 100)
        with pytest.raises(StaleEpoch) as caught:
            await asyncio.wait_for(asyncio.shield(f.task), 2)
        assert caught.value.details == {"promised_epoch": 3}
        assert f.shipper.fenced is caught.value
        assert all(link.state is LinkState.STOPPED for link in f.shipper.links)
        with pytest.raises(StaleEpoch):
            f.shipper.push(f.shipper.end, b"n")
        with pytest.raises(StaleEpoch):
            await f.shipper.room()


async def test_a_writer_that_was_superseded_before_it_connects_ships_nothing() -> None:
    async with fleet(down=6) as f:
        f.nodes[0].fence(3)
        await f.nodes[0].start()
        with pytest.raises(StaleEpoch):
            await asyncio.wait_for(asyncio.shield(f.task), 3)
        assert f.vdls == []


async def test_a_cancelled_shipper_leaves_no_connection() -> None:
    async with fleet() as f:
        f.task.cancel()
        await asyncio.gather(f.task, return_exceptions=True)
        await until(lambda: not any(node._lanes for node in f.nodes))
        assert all(link.state is LinkState.STOPPED for link in f.shipper.links)


# --- the pure part -----------------------------------------------------------------------------


@given(
    capacity=st.integers(1, 64),
    steps=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 64), st.integers(0, 5)), max_size=40
    ),
)
def test_the_window_holds_the_newest_bytes_and_never_drops_what_is_above_its_floor(
    capacity: int, steps: list[tuple[int, int, int]]
) -> None:
    window, model, floor = LogWindow(START, capacity), bytearray(), START
    for size, settled, wanted in steps:
        data = bytes((len(model) + n) % 251 for n in range(size))
        overlap = min(wanted, len(model))
        pushed = bytes(model[len(model) - overlap :]) + data
        if window.end + size - floor > capacity:
            with pytest.raises(Internal):
                window.push(Lsn(window.end - overlap), pushed)
        else:
            window.push(Lsn(window.end - overlap), pushed)
            model += data
        floor = max(floor, Lsn(min(START + settled, window.end)))
        window.raise_floor(floor)
        assert window.end == START + len(model)
        assert window.start <= floor <= window.end
        assert window.end - window.start == min(len(model), capacity)
        for at in range(window.start, window.end + 1):
            assert window.read(Lsn(at), window.end) == model[at - START :]
        if window.start > START:
            with pytest.raises(BelowLogStart):
                window.read(Lsn(window.start - 1), window.end)


def small_outbox(on_vdl: Callable[[Lsn], None] = lambda _: None) -> Outbox:
    return Outbox(
        volume=VolumeId("v"),
        lineage=LINEAGE,
        start=START,
        tracker=DurabilityTracker(SIX_WAY, START),
        window_bytes=1000,
        on_vdl=on_vdl,
    )


@given(st.data())
def test_the_vdl_is_what_four_nodes_hold_and_each_is_sent_every_byte_once(
    data: st.DataObject,
) -> None:
    names = [NodeName(f"sn-{n}") for n in range(1, 7)]
    vdls: list[Lsn] = []
    outbox = small_outbox(vdls.append)
    scls: dict[NodeName, Lsn] = {}
    logs = {name: bytearray() for name in names}
    pushed = bytearray()
    for _ in range(data.draw(st.integers(0, 60))):
        name = data.draw(st.sampled_from([None, *names]))
        if name is None:
            if not outbox.full:
                chunk = data.draw(st.binary(max_size=300))
                outbox.push(outbox.window.end, chunk)
                pushed += chunk
                outbox.begin_wave(patient=data.draw(st.booleans()))
        elif name not in scls:
            outbox.adopted(name, START)
            scls[name] = START
        elif scls[name] >= outbox.window.start:
            batch = outbox.batch(scls[name])
            (body,) = FrameReader("Append").feed(batch.frame)
            request = storage_pb2.AppendRequest.FromString(body)
            assert (request.start_lsn, request.vdl) == (scls[name], batch.vdl)
            assert batch.end == scls[name] + len(request.data)
            logs[name] += request.data
            scls[name] = batch.end
            outbox.acked(name, batch.end)
            assert batch.end <= max(outbox.wave_end, batch.start)
        held = sorted((*scls.values(), *[START] * 6), reverse=True)
        assert outbox.vdl == held[3]
        assert outbox.window.start <= outbox.vdl
        assert outbox.window.end - outbox.window.start <= 1000 + SLACK_BYTES
        assert all(pushed.startswith(log) for log in logs.values())
    assert vdls == sorted(set(vdls))


def test_nodes_at_the_same_place_are_sent_the_same_object() -> None:
    outbox = small_outbox()
    outbox.push(START, b"abc")
    assert outbox.begin_wave()
    first = outbox.batch(START)
    assert outbox.batch(START) is first


def test_the_log_leaves_in_waves() -> None:
    outbox = small_outbox()
    names = [NodeName(f"sn-{n}") for n in range(1, 5)]
    for name in names:
        outbox.adopted(name, START)

    def push() -> None:
        outbox.push(outbox.window.end, b"commit")

    def all_acknowledge() -> None:
        for name in names:
            outbox.acked(name, outbox.wave_end)

    push()
    assert outbox.begin_wave(), "a first commit leaves at once"
    push()
    push()
    assert not outbox.begin_wave(patient=False), "nothing passes a wave under way"
    all_acknowledge()
    assert outbox.begin_wave()
    assert outbox.wave_end == outbox.window.end
    push()
    all_acknowledge()
    assert outbox.gathering
    assert not outbox.begin_wave(), "two came last time, so this one waits for others"
    assert outbox.begin_wave(patient=False), "it waited long enough"
    all_acknowledge()
    push()
    assert outbox.begin_wave(), "one came last time"


def test_a_fenced_outbox_takes_nothing_and_its_vdl_stays() -> None:
    vdls: list[Lsn] = []
    outbox = small_outbox(vdls.append)
    outbox.push(START, b"abc")
    outbox.fenced = StaleEpoch("superseded", promised_epoch=3)
    for n in range(1, 7):
        outbox.adopted(NodeName(f"sn-{n}"), outbox.window.end)
    assert (outbox.vdl, vdls) == (START, [])
    with pytest.raises(StaleEpoch):
        outbox.push(outbox.window.end, b"def")


# --- contact with the nodes --------------------------------------------------------------------


async def test_an_idle_writer_keeps_in_contact_with_every_node() -> None:
    async with fleet() as f:
        await until(lambda: len(f.shipper.contacts) == 6)
        began = monotonic()
        await until(lambda: min(f.shipper.contacts) > began)
        assert {size for node in f.nodes for _, size, _ in node.appends} == {0}


async def test_contact_is_when_what_was_answered_was_sent() -> None:
    async with fleet() as f:
        await until(lambda: len(f.shipper.contacts) == 6)
        f.nodes[0].pause()
        paused = monotonic()
        f.push(b"x" * 100)  # this one takes it, and does not say so
        await f.durable()
        await until(lambda: sorted(f.shipper.contacts)[1] > paused)
        assert min(f.shipper.contacts) <= paused
        f.nodes[0].resume()
        await until(lambda: min(f.shipper.contacts) > paused)


async def test_a_fenced_writer_loses_contact_and_learns_of_it_though_idle() -> None:
    async with fleet() as f:
        await until(lambda: len(f.shipper.contacts) == 6)
        for node in f.nodes[:4]:
            node.fence(9)
        fenced = monotonic()
        await until(f.task.done)
        with pytest.raises(StaleEpoch):
            await f.task
        assert sorted(f.shipper.contacts)[3] <= fenced
