"""Which bundle a life starts from."""

from __future__ import annotations

from boreal.types import Lsn
from compute_node.fleet import ANY_END

_LIVES_PER_BUNDLE = 2


class BundleChoice:
    """The newest bundle; after lives that ended on their way from one to serving, an older one.

    Storage keeps a few, and replay brings all of them to the same end. Past the oldest it begins
    with the newest again.
    """

    def __init__(self) -> None:
        self.max_end = ANY_END
        """The bound for `Fleet.latest_bundle`."""
        self._tried = ANY_END
        self._failures = 0

    def ended(self, end: Lsn, *, served: bool) -> None:
        """A life that started from the bundle that ends at `end` (0: it got none) is over.

        `served`: it took clients, as what it was ordered to be, or was asked to stop; else it
        failed before that.
        """
        if served:
            self.max_end, self._failures = ANY_END, 0
            return
        if not end:
            return
        self._failures = self._failures + 1 if end == self._tried else 1
        self._tried = end
        if self._failures >= _LIVES_PER_BUNDLE:
            self.max_end = Lsn(end - 1)

    def begin_again(self) -> None:
        """There is no bundle within the bound."""
        self.max_end, self._failures = ANY_END, 0
