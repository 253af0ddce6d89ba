"""From acks to the VDL."""

from __future__ import annotations

from collections.abc import Mapping

from boreal.errors import Internal
from boreal.quorum.rule import QuorumRule
from boreal.types import Lsn, NodeName, format_lsn


class DurabilityTracker:
    """One writer's view of how far its log is durable.

    It begins at `durable`, the start of the writer's epoch, and may be made only once a write
    quorum holds the log up to there under the writer's lineage (`RecoveryPlan.carried_out`): below
    it, four SCLs prove nothing. From then on it counts only segments that adopted that lineage.
    Whoever asks a segment for its position must compare the lineage in the answer before reporting
    its SCL here.

    Invariant: the VDL never shrinks, and at least `rule.write` of the segments reported an SCL at
    or past it.

    The VDL is a byte position. A commit is durable when its record's end is at or below it; the cut
    that recovery makes lies at a record's end, so the bytes of an unfinished record may sit below
    the VDL and still be cut: nothing was ever acknowledged on their account.
    """

    def __init__(self, rule: QuorumRule, durable: Lsn) -> None:
        self._rule = rule
        self._scls: dict[NodeName, Lsn] = {}
        self._vdl = durable

    @property
    def vdl(self) -> Lsn:
        """Everything below is on a write quorum."""
        return self._vdl

    @property
    def scls(self) -> Mapping[NodeName, Lsn]:
        """The last SCL each segment reported under this lineage."""
        return self._scls

    @property
    def held_everywhere(self) -> Lsn | None:
        """Every segment of the volume holds all below it; None while one has not reported.

        A segment that is away counts with what it reported last: it will want the rest.
        """
        if len(self._scls) < self._rule.copies:
            return None
        return min(self._scls.values())

    def adopted(self, node: NodeName, scl: Lsn) -> Lsn:
        """A segment adopted this writer's lineage and stands at `scl`; return the VDL."""
        self._scls[node] = scl
        return self._advance()

    def acked(self, node: NodeName, scl: Lsn) -> Lsn:
        """A segment acknowledged everything up to `scl`; return the VDL."""
        known = self._scls.get(node)
        if known is None:
            raise Internal(f"{node} acknowledged {format_lsn(scl)} before it adopted the lineage")
        if scl > known:
            self._scls[node] = scl
        return self._advance()

    def _advance(self) -> Lsn:
        if len(self._scls) > self._rule.copies:
            raise Internal(f"{len(self._scls)} segments reported; there are {self._rule.copies}")
        if len(self._scls) >= self._rule.write:
            quorum_scl = sorted(self._scls.values(), reverse=True)[self._rule.write - 1]
            self._vdl = max(self._vdl, quorum_scl)
        return self._vdl
