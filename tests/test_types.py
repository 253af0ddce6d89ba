"""Goal: LSNs are read, written and rounded as PostgreSQL does it. Method: known values."""

from __future__ import annotations

import pytest

from boreal.types import format_lsn, parse_lsn, record_end_before, wal_file_name


@pytest.mark.parametrize(
    ("insert", "end"),
    [
        ("0/3F7D0018", "0/3F7D0000"),  # behind a short page header
        ("0/5000028", "0/5000000"),  # behind a segment's long one
        ("0/5000018", "0/5000018"),  # inside a long header: not a header's end
        ("0/3F7D0028", "0/3F7D0028"),
        ("0/3F7D0020", "0/3F7D0020"),
    ],
)
def test_the_last_record_ends_before_a_page_header(insert: str, end: str) -> None:
    assert format_lsn(record_end_before(parse_lsn(insert))) == end


def test_names() -> None:
    assert format_lsn(parse_lsn("1/AE5E07B8")) == "1/AE5E07B8"
    assert wal_file_name(2, parse_lsn("1/AE5E07B8")) == "0000000200000001000000AE"
