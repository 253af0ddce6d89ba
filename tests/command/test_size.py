"""Sizes on the command line. Goal: PostgreSQL's units, and a clear refusal of anything else."""

from __future__ import annotations

import click
import pytest

from boreal.command.size import Size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MB", 512 * 1024**2),
        ("2GB", 2 * 1024**3),
        ("1tb", 1024**4),
        ("64 M", 64 * 1024**2),
        ("33554432", 32 * 1024**2),
        ("unlimited", 0),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert Size(least_bytes=16 * 1024**2).convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "MB", "-1GB", "1.5GB", "1PB", "0", "8MB"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Size(least_bytes=16 * 1024**2).convert(text, None, None)
