"""What storage nodes compare of a run of pages: equal digests, equal pages, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

_PAGE = b"\1"
_NO_PAGE = b"\0"


class PagesDigest:
    """SHA-256 over a run of pages, added in order (PageDigest, proto/storage.proto)."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, pages: Iterable[bytes | None]) -> None:
        """Take the next pages, of 8 KiB each; None is a block that does not exist."""
        for page in pages:
            if page is None:
                self._hash.update(_NO_PAGE)
            else:
                self._hash.update(_PAGE)
                self._hash.update(page)

    def result(self) -> bytes:
        """The digest of what was added so far."""
        return self._hash.digest()


def digest_pages(pages: Iterable[bytes | None]) -> bytes:
    """The digest of a whole run."""
    digest = PagesDigest()
    digest.add(pages)
    return digest.result()
