"""The pure heart: lineage, segment, durability, recovery, lease. Values in, values out.

A volume's log is one byte stream. It lives on six segments; a byte range is *durable* once four of
them hold it. Writers come and go, each under a volume epoch of its own; what one may do to the log
that its predecessors left is decided here, and only here.

The safety claim, which tests/quorum checks over every interleaving it can reach: **a record whose
end was once at or below a VDL is in every later writer's log, unchanged; so no two writers ever
both reach four acks for different records at the same place.** (Bytes of a record that never became
whole carry no promise: the VDL may pass over them, and recovery cuts them.)

Why it holds. A segment's *position* is the pair (log epoch, SCL), compared as a pair, where the log
epoch is the last epoch of its lineage that begins at or below its SCL. Segments of one log epoch
hold the same bytes as far as both reach. An acknowledged range was held by four segments whose log
epoch was the writer's. Recovery fences four segments, at least two of which are among those four,
and each of them accepts nothing older afterwards; it then takes over the log of the highest
position it saw. By induction over the epochs between, that log holds the range. (The same argument
as Raft's election restriction: the lineage entry plays the part of the new leader's first entry,
which is why SCL alone must never decide.)

The argument leans on four things that no segment can check by itself:

- An epoch makes one plan. Two plans under one epoch are two histories of one name; whoever gives up
  a recovery half-way, or restarts, needs a new epoch.
- A writer counts nothing before its whole log up to T is on a write quorum under its own lineage
  (`RecoveryPlan.carried_out`). Four copies of older bytes under older log epochs are not durable: a
  segment that was away may come back with a younger log epoch and fewer of them (Raft, figure 8).
- Log is dropped only below a durable record's end that all six hold (`SegmentState.trim`,
  `DurabilityTracker.held_everywhere`). So whatever a later writer takes over reaches down to where
  it parts from any other segment, and whoever lacks something finds it at a peer.
- Every segment begins with the epoch that created the volume (`SegmentState.created`), whenever it
  is made: given the current epoch, an empty segment would outrank every other.
"""

from boreal.quorum.durability import DurabilityTracker
from boreal.quorum.lineage import EpochStart, Lineage, TimelineStart
from boreal.quorum.recovery import RecoveryPlan, choose_source, plan_recovery
from boreal.quorum.rule import SIX_WAY, QuorumRule
from boreal.quorum.segment import Accepted, SegmentState

__all__ = [
    "SIX_WAY",
    "Accepted",
    "DurabilityTracker",
    "EpochStart",
    "Lineage",
    "QuorumRule",
    "RecoveryPlan",
    "SegmentState",
    "TimelineStart",
    "choose_source",
    "plan_recovery",
]
