"""Waiting for a condition, always with a bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def wait_until(
    condition: Callable[[], _T],
    *,
    timeout_s: float,
    otherwise: Callable[[], Exception],
    poll_s: float = 0.02,
) -> _T:
    """Return the first true value of `condition`; raise `otherwise()` once the bound has passed."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() >= deadline:
            raise otherwise()
        time.sleep(poll_s)
    return value
