"""A fleet of six segments, its writers and its network, in one thread and in no time at all.

Goal: reach the interleavings that lose data if any rule of boreal.quorum is wrong, and notice.

Method: everything that may happen is an action; whoever drives (a seed, hypothesis) says which
action comes next and, through `Choose`, every detail of it. So a run is a function of its choices.
Segments hold real bytes; which epoch wrote them where can be told from the bytes. Messages may be
late, reordered, repeated or lost, nodes may be killed (also half-way through a message), lose power
or be out of a writer's reach, writers may stop in every step and never learn that they are stale.
After each action the invariants below are checked; a breach raises `Violation`.

Kept deliberately: a writer goes on after StaleEpoch. Safety must not hang on its good manners.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import Enum

from boreal.errors import LineageNotAdopted, LogGap, QuorumUnavailable, StaleEpoch
from boreal.quorum import SIX_WAY, DurabilityTracker, Lineage, RecoveryPlan, SegmentState
from boreal.types import Epoch, Lsn, NodeName
from tests.quorum.parts import (
    FIRST_EPOCH,
    LOG_START,
    NODES,
    Adopt,
    Answer,
    Append,
    AskPosition,
    Body,
    Call,
    Chunk,
    Fence,
    Message,
    Pull,
    ReadLog,
    Rules,
    Segment,
    TellDurable,
    Trim,
    Violation,
    Writer,
    record,
    record_end,
)

Choose = Callable[[int], int]
"""`choose(n)` picks a number from 0 to n - 1."""

MAX_EPOCHS = 30
MAX_LATE_MESSAGES = 20
MAX_APPEND_BYTES = 40


class Action(Enum):
    """All that may happen next."""

    DELIVER = "a message arrives"
    REPEAT = "a message arrives and is still on its way"
    DROP = "a message is lost"
    WORK = "a writer takes its next step, towards some nodes; the network takes its time"
    EXCHANGE = "the same, and most messages and answers arrive at once"
    TEAR = "the same, and one of the nodes is killed while it carries its message out"
    WRITE = "a writer adds a record"
    START = "a new writer appears"
    PARTITION = "a writer reaches other nodes than before"
    STOP = "a writer dies"
    PULL = "a segment takes the lineage or the log of a peer"
    READ = "a reader tells a node what its writer knows to be durable"
    TRIM = "a writer tells nodes what log nobody needs any more"
    KILL = "a node's process is killed"
    POWER_LOSS = "a node's machine loses power"
    RESTART = "a node comes back"


WRITER_ACTIONS = frozenset(
    {
        Action.WORK,
        Action.EXCHANGE,
        Action.TEAR,
        Action.WRITE,
        Action.PARTITION,
        Action.STOP,
        Action.READ,
        Action.TRIM,
    }
)


class Simulation:
    """The world. `act` is the only way anything happens in it."""

    def __init__(self, rules: Rules | None = None, *, late_segments: int = 0) -> None:
        self.rules = rules or Rules()
        self.messages: list[Message] = []
        self.acknowledged: dict[Epoch, bytes] = {}
        """The log up to the last record that each epoch acknowledged: what must never be lost."""
        self._held: dict[tuple[Epoch, NodeName], Lsn] = {}
        self._ceilings: dict[Epoch, Lsn] = {}
        self.segments = {name: Segment(name=name) for name in NODES}
        for position, segment in enumerate(self.segments.values()):
            segment.up = position >= late_segments
            if segment.up:
                segment.state = self.rules.created(FIRST_EPOCH)
        self.writers = {FIRST_EPOCH: self._creator()}

    def _creator(self) -> Writer:
        lineage = Lineage.of([(FIRST_EPOCH, 0)])
        plan = RecoveryPlan(lineage=lineage, end=LOG_START, source=NODES[-1])
        return Writer(epoch=FIRST_EPOCH, plan=plan, tracker=DurabilityTracker(SIX_WAY, LOG_START))

    def act(self, action: Action, choose: Choose) -> None:
        """Let `action` happen, if it can."""
        while len(self.messages) > MAX_LATE_MESSAGES:
            del self.messages[choose(len(self.messages))]
        match action:
            case Action.DELIVER | Action.REPEAT | Action.DROP if self.messages:
                self._move_message(action, choose)
            case _ if action in WRITER_ACTIONS:
                living = [writer for writer in self.writers.values() if writer.alive]
                if living:
                    # The newest are the interesting ones, but the old ones are not to be forgotten.
                    recent = living[-1 - choose(min(1 + choose(2) * choose(3), len(living)))]
                    self._writer_acts(action, recent, choose)
            case Action.START if len(self.writers) < MAX_EPOCHS:
                self.start_writer(_some_nodes(choose, at_least=SIX_WAY.write))
            case Action.PULL:
                puller, peer = _pick(choose, NODES), _pick(choose, NODES)
                if puller != peer and self.segments[puller].up:
                    late = len(self.messages)
                    self.pull(puller, peer)
                    self._deliver_most(late, choose)
            case Action.KILL | Action.POWER_LOSS | Action.RESTART:
                segment = self.segments[_pick(choose, NODES)]
                if segment.up is not (action is Action.RESTART):
                    self._change_power(action, segment)
            case _:
                pass
        self.check()

    # --- network

    def _move_message(self, action: Action, choose: Choose) -> None:
        # Mostly about in order; now and then something very old turns up, or the latest overtakes.
        index = choose(len(self.messages) if not choose(4) else min(3, len(self.messages)))
        message = self.messages[index]
        if action is not Action.REPEAT:
            del self.messages[index]
        if action is not Action.DROP:
            self.deliver(message)

    def _deliver_most(self, late: int, choose: Choose) -> None:
        """Deliver what was sent after the first `late` messages, and the answers; some linger."""
        while len(self.messages) > late:
            message = self.messages.pop(late + choose(len(self.messages) - late))
            if choose(8):
                self.deliver(message)
            else:
                self.messages.insert(late, message)
                late += 1

    def deliver(self, message: Message) -> None:
        """Hand a message over; a process that is down or has no use for it lets it go."""
        if isinstance(message.body, Answer):
            writer = self.writers[message.epoch]
            if writer.alive:
                self._hear(writer, message.node, message.body)
            return
        segment = self.segments[message.node]
        if segment.up:
            # A refused caller finds out by asking for the position, or never.
            with suppress(StaleEpoch, LineageNotAdopted):
                self._carry_out(segment, message)
            self.check()

    def _send(self, node: NodeName, epoch: Epoch, body: Body) -> None:
        self.messages.append(Message(node=node, epoch=epoch, body=body))

    # --- nodes

    def _carry_out(self, segment: Segment, message: Message) -> None:
        state, epoch, call = segment.known, message.epoch, message.body
        match call:
            case Fence():
                segment.state = self.rules.fence(state, epoch)
                self._answer(segment, epoch, call)
            case ReadLog():
                state.check_epoch(epoch)
                self._answer(segment, epoch, call, data=bytes(segment.log))
            case Adopt():
                segment.state = self.rules.adopt(state, epoch, call.lineage)
                del segment.log[segment.state.scl :]
                self._answer(segment, epoch, call)
            case Append():
                self._append(segment, epoch, call)
            case AskPosition():
                state.check_epoch(epoch)
                self._answer(segment, epoch, call)
            case TellDurable():
                segment.state = self.rules.told_durable(state, epoch, call.end)
            case Trim():
                self._drop(segment, epoch, call)
            case Pull():
                self._supply(segment, epoch, call)
            case Chunk():
                self._fill(segment, call)

    def _drop(self, segment: Segment, epoch: Epoch, call: Trim) -> None:
        segment.known.check_follows(epoch)
        segment.state = self.rules.trim(segment.known, call.floor)
        segment.dropped = segment.state.start

    def _supply(self, segment: Segment, epoch: Epoch, call: Pull) -> None:
        self.rules.check_source_of_catch_up(segment.known, epoch)
        if call.at >= segment.known.start:
            data = bytes(segment.log[call.at : call.at + MAX_APPEND_BYTES])
            self._send(call.to, epoch, Chunk(lineage=call.lineage, at=call.at, data=data))

    def _fill(self, segment: Segment, chunk: Chunk) -> None:
        state = segment.known
        self.rules.check_catch_up(state, chunk.lineage)
        if chunk.at <= state.scl:
            segment.log += chunk.data[state.scl - chunk.at :]
            segment.state = replace(state, scl=Lsn(len(segment.log)))

    def _append(self, segment: Segment, epoch: Epoch, call: Append) -> None:
        try:
            accepted = self.rules.append(segment.known, epoch, call.at, len(call.data), call.vdl)
        except LogGap:
            self._answer(segment, epoch, call, gap=True)
            return
        segment.log[accepted.at :] = call.data[accepted.skip :]
        segment.state = accepted.state
        self._answer(segment, epoch, call)

    def _answer(
        self,
        segment: Segment,
        epoch: Epoch,
        call: Call,
        *,
        data: bytes = b"",
        gap: bool = False,
    ) -> None:
        answer = Answer(call=call, state=segment.known, data=data, gap=gap)
        self._send(segment.name, epoch, answer)

    def _tear(self, message: Message, choose: Choose) -> None:
        """Kill the node half-way through carrying `message` out: nobody gets an answer."""
        segment = self.segments[message.node]
        if isinstance(message.body, Answer) or not segment.up:
            return
        before, log, call = segment.known, bytes(segment.log), message.body
        if isinstance(call, Append) and call.data:
            part = replace(call, data=call.data[: choose(len(call.data))])
            message = replace(message, body=part)
        waiting = list(self.messages)
        self.deliver(message)
        self.messages = waiting
        segment.up = False
        if isinstance(call, Adopt) and choose(2):
            after = segment.known
            if self.rules.adopt_cuts_first:
                segment.state = replace(before, scl=after.scl, vdl=min(before.vdl, after.scl))
            else:
                segment.log[:] = log
                segment.state = replace(after, scl=before.scl)
        if isinstance(call, Trim) and choose(2):
            if self.rules.trim_says_so_first:
                segment.dropped = before.start
            else:
                segment.state = before

    def _change_power(self, action: Action, segment: Segment) -> None:
        segment.up = action is Action.RESTART
        if segment.state is None:
            segment.state = self.rules.created(max(self.writers))
        elif action is Action.RESTART:
            segment.state = self.rules.restarted(segment.state)
            segment.dropped = max(segment.dropped, segment.state.start)
        elif action is Action.POWER_LOSS:
            # What cannot be proved by a record's checksum is cut; the VDL lived in memory.
            scl = record_end(segment.log)
            del segment.log[scl:]
            segment.state = replace(segment.state, scl=scl, vdl=segment.state.start)

    def pull(self, puller: NodeName, peer: NodeName) -> None:
        """Gossip: take the newer lineage of `peer`, else ask it for what follows our SCL."""
        state, other = self.segments[puller].known, self.segments[peer].state
        if other is not None and other.lineage.last.epoch > state.lineage.last.epoch:
            self._send(puller, other.lineage.last.epoch, Adopt(lineage=other.lineage))
            return
        request = Pull(to=puller, lineage=state.lineage, at=state.scl)
        self._send(peer, state.lineage.last.epoch, request)

    # --- writers

    def start_writer(self, reach: tuple[NodeName, ...] = NODES) -> Writer:
        """The control plane allocates an epoch. Nobody tells the writers before it."""
        epoch = Epoch(max(self.writers) + 1)
        self.writers[epoch] = Writer(epoch=epoch, reach=reach)
        return self.writers[epoch]

    def _writer_acts(self, action: Action, writer: Writer, choose: Choose) -> None:
        if action is Action.STOP:
            writer.alive = False
        elif action is Action.PARTITION:
            writer.reach = _some_nodes(choose, at_least=1)
        elif action is Action.WRITE and writer.tracker:
            for _ in range(1 + choose(4)):
                self.write(writer, 2 + choose(12))
        elif action is Action.READ and writer.tracker:
            end = record_end(writer.log[: writer.vdl])
            self._send(_pick(choose, NODES), writer.epoch, TellDurable(end=end))
        elif action is Action.TRIM and writer.tracker:
            self._trim(writer, choose)
        elif action is Action.WORK:
            self.work(writer, choose)
        elif action in {Action.EXCHANGE, Action.TEAR}:
            late = len(self.messages)
            self.work(writer, choose)
            if action is Action.TEAR and len(self.messages) > late:
                torn = self.messages.pop(late + choose(len(self.messages) - late))
                self._tear(torn, choose)
            self._deliver_most(late, choose)

    def _trim(self, writer: Writer, choose: Choose) -> None:
        late = len(self.messages)
        self.send_floor(writer, _some_nodes(choose, at_least=1))
        if len(self.messages) > late and not choose(6):
            self._tear(self.messages.pop(), choose)
        self._deliver_most(late, choose)

    def write(self, writer: Writer, size: int) -> None:
        """PostgreSQL adds a record."""
        writer.log += record(writer.epoch, len(writer.log), size)

    def send_floor(self, writer: Writer, nodes: tuple[NodeName, ...]) -> None:
        """Tell the nodes what log is of no use any more."""
        if writer.tracker is None:
            return
        floor = self.rules.floor(writer.tracker)
        if floor is not None:
            if self.rules.floor_at_record_end:
                floor = record_end(writer.log[:floor])
            for node in nodes:
                self._send(node, writer.epoch, Trim(floor=floor))

    def work(self, writer: Writer, choose: Choose) -> None:
        """Do what the writer's step asks for, towards each node or not."""
        if writer.plan is None and writer.source is None and choose(2):
            self._choose_source(writer)
        for node in writer.reach:
            if not choose(4):
                continue
            if writer.plan is not None:
                self._work_on_log(writer, writer.plan, node, choose)
            elif writer.source is None and (node not in writer.answers or not choose(6)):
                self._send(node, writer.epoch, Fence())
            elif node == writer.source:
                self._send(node, writer.epoch, ReadLog())

    def _choose_source(self, writer: Writer) -> None:
        with suppress(QuorumUnavailable):
            writer.source = self.rules.choose(writer.epoch, writer.answers)

    def _work_on_log(
        self, writer: Writer, plan: RecoveryPlan, node: NodeName, choose: Choose
    ) -> None:
        if not choose(8) or (node not in writer.positions and choose(8)):
            call = Adopt(lineage=plan.lineage) if choose(2) else AskPosition()
            self._send(node, writer.epoch, call)
            return
        at = writer.sent.get(node, plan.end)
        if at >= len(writer.log) and choose(4):
            return
        at = Lsn(max(writer.first, at - choose(4)))
        data = bytes(writer.log[at : at + 1 + choose(1 + choose(MAX_APPEND_BYTES))])
        self._send(node, writer.epoch, Append(at=at, data=data, vdl=writer.vdl))
        writer.sent[node] = Lsn(at + len(data))

    def _hear(self, writer: Writer, node: NodeName, answer: Answer) -> None:
        match answer.call:
            case Fence() if writer.source is None and writer.plan is None:
                writer.answers[node] = answer.state
            case ReadLog() if writer.plan is None and node == writer.source:
                self._make_plan(writer, answer)
            case Adopt() | AskPosition() if writer.plan is not None:
                if self.rules.counts(writer.plan, answer.state):
                    writer.positions[node] = answer.state
                    writer.sent[node] = answer.state.scl
                    if writer.tracker is not None:
                        writer.tracker.adopted(node, answer.state.scl)
            case Append() if answer.gap:
                writer.sent[node] = answer.state.scl
            case Append() if node in writer.positions:
                known = writer.positions[node]
                scl = max(known.scl, answer.state.scl)
                writer.positions[node] = replace(known, scl=scl)
                if writer.tracker is not None:
                    writer.tracker.acked(node, scl)
            case _:
                pass
        self._advance(writer)

    def _make_plan(self, writer: Writer, answer: Answer) -> None:
        end = record_end(answer.data)
        if end < answer.state.start:
            raise Violation(f"{writer.source} dropped the log that recovery would cut at")
        writer.plan = self.rules.plan(writer.epoch, writer.answers, end)
        writer.log += answer.data[:end]
        writer.first = answer.state.start
        for earlier, promised in self.acknowledged.items():
            if earlier < writer.epoch and not writer.log.startswith(promised):
                raise Violation(
                    f"epoch {writer.epoch} starts at {end}, from {writer.source}, without what "
                    f"epoch {earlier} acknowledged up to {len(promised)}"
                )

    def _advance(self, writer: Writer) -> None:
        if writer.tracker is None:
            if writer.plan is None or not self.rules.may_serve(writer.plan, writer.positions):
                return
            first = self.rules.first_vdl(writer.plan)
            writer.tracker = DurabilityTracker(SIX_WAY, first)
            for node, state in writer.positions.items():
                writer.tracker.adopted(node, state.scl)
        vdl = writer.tracker.vdl
        if vdl < writer.vdl:
            raise Violation(f"the VDL of epoch {writer.epoch} fell from {writer.vdl} to {vdl}")
        if vdl > writer.vdl:
            writer.vdl = vdl
            self._acknowledge(writer)

    # --- invariants

    def _acknowledge(self, writer: Writer) -> None:
        """A writer's VDL grew: its records up to there are promised to the world."""
        reached = max(writer.vdl, writer.plan.end if writer.plan else writer.vdl)
        holders = [n for n in NODES if self._held.get((writer.epoch, n), LOG_START) >= reached]
        if len(holders) < SIX_WAY.write:
            raise Violation(f"epoch {writer.epoch} takes for durable what only {holders} ever held")
        if writer.vdl > self._ceilings.get(writer.epoch, writer.vdl):
            raise Violation(
                f"the stale writer of epoch {writer.epoch} got four acks up to {writer.vdl}, past "
                f"{self._ceilings[writer.epoch]}"
            )
        promised = bytes(writer.log[: record_end(writer.log[: writer.vdl])])
        for other in self.acknowledged.values():
            shorter, longer = sorted((promised, other), key=len)
            if not longer.startswith(shorter):
                raise Violation(f"epoch {writer.epoch} contradicts what was acknowledged before")
        self.acknowledged[writer.epoch] = promised
        for later in self.writers.values():
            if later.epoch > writer.epoch and later.plan and not later.log.startswith(promised):
                raise Violation(
                    f"epoch {writer.epoch} acknowledged up to {len(promised)} what epoch "
                    f"{later.epoch} does not have"
                )

    def check(self) -> None:
        """Every segment holds what its lineage says, and keeps what it was told is durable."""
        changed = [s for s in self.segments.values() if s.state is not s.checked]
        for segment in changed:
            self._check_segment(segment, segment.known)
            segment.checked = segment.state
        if not changed:
            return
        for epoch in self.writers.keys() - self._ceilings.keys():
            fenced = [
                s.name for s in self.segments.values() if s.state and s.state.promised > epoch
            ]
            if len(fenced) >= SIX_WAY.write:
                # The two nodes left may still help it to whatever two of the fenced four hold.
                held = sorted(self._held.get((epoch, name), LOG_START) for name in fenced)
                self._ceilings[epoch] = held[-2]

    def _check_segment(self, segment: Segment, state: SegmentState) -> None:
        truth = self.writers[state.lineage.last.epoch].log
        if segment.dropped > state.start:
            raise Violation(f"{segment.name} says it holds log that it dropped")
        if len(segment.log) != state.scl or not truth.startswith(segment.log):
            raise Violation(f"{segment.name} holds other bytes than its lineage {state.lineage}")
        if not segment.log.startswith(segment.indexed):
            raise Violation(f"{segment.name} lost records it was told are durable")
        if state.vdl > len(segment.indexed):
            segment.indexed = bytes(segment.log[: record_end(segment.log[: state.vdl])])
            if not any(log.startswith(segment.indexed) for log in self.acknowledged.values()):
                raise Violation(f"{segment.name} takes records for durable that are not")
        if not state.fenced:
            key = (state.lineage.last.epoch, segment.name)
            self._held[key] = max(self._held.get(key, LOG_START), state.scl)

    # --- the calm after

    def settle(self) -> None:
        """Restart everything, let one new writer work undisturbed: it must get everywhere."""
        for segment in self.segments.values():
            if not segment.up:
                self._change_power(Action.RESTART, segment)
        for writer in self.writers.values():
            writer.alive = False
        self.messages.clear()
        writer = self.start_writer()
        for _ in range(100):
            self.work(writer, lambda n: n - 1)
            self._deliver_all()
            for puller, peer in zip(NODES, NODES[1:] + NODES[:1], strict=True):
                self.pull(puller, peer)
            self.send_floor(writer, NODES)
            self._deliver_all()
            if writer.tracker and record_end(writer.log) == writer.vdl:
                if all(s.log == writer.log for s in self.segments.values()):
                    return
                self.write(writer, 5)
        raise Violation(f"epoch {writer.epoch} did not bring the segments together")

    def _deliver_all(self) -> None:
        while self.messages:
            self.deliver(self.messages.pop(0))
            self.check()


def _pick(choose: Choose, names: tuple[NodeName, ...]) -> NodeName:
    return names[choose(len(names))]


def _some_nodes(choose: Choose, *, at_least: int) -> tuple[NodeName, ...]:
    nodes = list(NODES)
    for _ in range(choose(1 + len(NODES) - at_least)):
        del nodes[choose(len(nodes))]
    return tuple(nodes)


def run_seed(seed: int, rules: Rules | None = None, *, actions: int = 600) -> Simulation:
    """One run, decided by `seed` alone. Each seed has its own kind of weather."""
    rng = random.Random(seed)
    simulation = Simulation(rules, late_segments=rng.choice((0, 0, 1, 2)))
    trouble = rng.choice((0.1, 0.3, 1.0, 2.0))
    weights = {
        Action.EXCHANGE: 10,
        Action.WORK: rng.choice((0, 2)),
        Action.DELIVER: rng.choice((3, 10)),
        Action.REPEAT: trouble,
        Action.DROP: trouble,
        Action.TEAR: trouble,
        Action.WRITE: 5,
        Action.START: rng.choice((0.2, 0.6, 1.5)),
        Action.PARTITION: rng.choice((0.1, 0.5)),
        Action.STOP: rng.choice((0, 0.1, 0.3)),
        Action.PULL: rng.choice((0, 2, 5)),
        Action.READ: rng.choice((0, 2)),
        Action.TRIM: rng.choice((0, 0.5, 2)),
        Action.KILL: trouble,
        Action.POWER_LOSS: trouble * 0.5,
        Action.RESTART: trouble * rng.choice((5, 10)),
    }
    for action in rng.choices(list(weights), list(weights.values()), k=actions):
        simulation.act(action, rng.randrange)
    simulation.settle()
    return simulation
