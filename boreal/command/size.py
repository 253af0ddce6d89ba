"""Sizes on the command line: `512MB`, `2GB`, `unlimited`."""

from __future__ import annotations

import re

import click

_SIZE = re.compile(r"(\d+)\s*([KMGT]?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class Size(click.ParamType[int]):
    """A number of bytes, in PostgreSQL's units of 1024. `unlimited` is 0."""

    name = "size"

    def __init__(self, least_bytes: int = 1) -> None:
        self._least_bytes = least_bytes

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Read it; a click usage error if it is none, or too small."""
        if isinstance(value, int):
            return value
        if str(value).lower() == "unlimited":
            return 0
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no size; write 512MB, 2GB, or unlimited", param, ctx)
        size: int = int(match[1]) * 1024 ** _POWERS[match[2].upper()]
        if size < self._least_bytes:
            least_mb = self._least_bytes // 1024**2
            self.fail(f"{value!r} is too small; {least_mb}MB is the least", param, ctx)
        return size
