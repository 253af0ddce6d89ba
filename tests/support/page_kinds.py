"""Which kind of page it is, by its relation or by the records about it."""

from __future__ import annotations

from boreal.pages import PageKind
from boreal.wal import Rmgr

KIND_OF_RMGR = {
    Rmgr.HEAP: PageKind.HEAP,
    Rmgr.HEAP2: PageKind.HEAP,
    Rmgr.BTREE: PageKind.BTREE,
    Rmgr.HASH: PageKind.HASH,
    Rmgr.GIN: PageKind.GIN,
    Rmgr.GIST: PageKind.GIST,
    Rmgr.SPGIST: PageKind.SPGIST,
    Rmgr.BRIN: PageKind.BRIN,
    Rmgr.SEQ: PageKind.SEQUENCE,
    Rmgr.GENERIC: PageKind.GENERIC,
}
"""By the resource manager of a record about the page."""
_KIND_OF_METHOD = {
    "btree": PageKind.BTREE,
    "hash": PageKind.HASH,
    "gin": PageKind.GIN,
    "gist": PageKind.GIST,
    "spgist": PageKind.SPGIST,
    "brin": PageKind.BRIN,
    "hnsw": PageKind.GENERIC,
    "ivfflat": PageKind.GENERIC,
}


def kind_of_relation(relkind: str, method: str | None) -> PageKind:
    """Of a relation's main fork, by pg_class.relkind and the name of its access method, if any."""
    return PageKind.SEQUENCE if relkind == "S" else _KIND_OF_METHOD.get(method or "", PageKind.HEAP)
