"""Who was heard when. Volatile: a control plane that starts has heard nobody yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]
"""Monotonic seconds."""

SILENT_MS = 2_000
"""A member not heard for longer is not alive. Reports come every few hundred milliseconds."""
CUT_MS = 400
"""So long an instance whose call broke off may take to call again: agents do so at once."""
UNHEARD_MS = 3_000
"""So long members may take to report after this control plane heard the first of their kind."""


class AttentiveClock:
    """Monotonic seconds, of which a stretch in which nobody looked counts only a little.

    What was not heard while this process was stopped, or starved, is no sign of anybody's death.
    It is looked at with every report and every tick, so in normal times it just runs.
    """

    def __init__(self, clock: Clock, longest_s: float = 0.2) -> None:
        self._clock = clock
        self._longest_s = longest_s
        self._last = clock()
        self._attended_s = 0.0

    def __call__(self) -> float:
        """Seconds since it was made, as attended."""
        now = self._clock()
        self._attended_s += min(now - self._last, self._longest_s)
        self._last = now
        return self._attended_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """How long nothing was heard of a member."""

    ms: int
    heard: bool
    """False: never since this control plane started, and `ms` counts from the first of its kind
    that was."""
    cut_ms: int | None = None
    """How long ago its last call broke off, if it did."""

    @property
    def lost(self) -> bool:
        """Whether others may be preferred to it."""
        if self.cut_ms is not None and self.cut_ms > CUT_MS:
            return True
        return self.ms > (SILENT_MS if self.heard else UNHEARD_MS)

    @property
    def alive(self) -> bool:
        """Whether it is known to be there."""
        return self.heard and not self.lost

    def __str__(self) -> str:
        if not self.heard:
            return "it was not heard since the control plane started"
        if self.cut_ms is not None:
            return f"its connection broke {self.cut_ms} ms ago"
        return f"it has been silent for {self.ms} ms"


@dataclass(slots=True)
class _Heard:
    at: float
    call: int
    cut_at: float | None = None


class Presence:
    """When each member of one kind last called, and whether that call broke off."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since = clock()
        self._heard: dict[str, _Heard] = {}
        self._calls = 0

    @property
    def anybody(self) -> bool:
        """Whether anybody was heard."""
        return self._calls > 0

    def heard(self, name: str) -> int:
        """`name` calls; return a number for this call."""
        now = self._clock()
        if not self.anybody:
            self._since = now
        self._calls += 1
        self._heard[name] = _Heard(at=now, call=self._calls)
        return self._calls

    def cut(self, name: str, call: int) -> None:
        """The call broke off. It means something only if no other came meanwhile."""
        last = self._heard.get(name)
        if last is not None and last.call == call:
            last.cut_at = self._clock()

    def forget(self, name: str) -> None:
        """It is no member any more."""
        self._heard.pop(name, None)

    def silence(self, name: str) -> Silence:
        """How long nothing was heard of it."""
        now = self._clock()
        last = self._heard.get(name)
        if last is None:
            return Silence(ms=_ms(now - self._since), heard=False)
        cut_ms = None if last.cut_at is None else _ms(now - last.cut_at)
        return Silence(ms=_ms(now - last.at), heard=True, cut_ms=cut_ms)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
