"""How many copies make a quorum (Aurora, SIGMOD 2017, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

from boreal.errors import Internal


@dataclass(frozen=True, slots=True, kw_only=True)
class QuorumRule:
    """V copies, Vw to write, Vr to recover.

    Invariant: Vr + Vw > V, so recovery sees every write; 2 Vw > V, so two writers cannot both win.
    """

    copies: int
    write: int
    read: int

    def __post_init__(self) -> None:
        if self.read + self.write <= self.copies or 2 * self.write <= self.copies:
            raise Internal(f"{self} does not intersect: need read+write > copies, 2*write > copies")


SIX_WAY = QuorumRule(copies=6, write=4, read=3)
"""Two copies in each of three zones. A zone may fail and writes go on; a node more: no loss."""
