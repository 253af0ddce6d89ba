"""What pages look like inside, as far as storage must know. Pure.

`layout` is what all pages share, `visibility` the visibility map, `masks` what may differ between
copies of a page that are the same to PostgreSQL, `compare` what `boreal verify` asks, `digest` what
it compares the storage nodes by.
"""

from boreal.pages.compare import same_page
from boreal.pages.digest import PagesDigest, digest_pages
from boreal.pages.layout import HEADER_BYTES, PageHeader, is_zero, page_lsn, set_page_lsn
from boreal.pages.masks import PageKind, mask_page

__all__ = [
    "HEADER_BYTES",
    "PageHeader",
    "PageKind",
    "PagesDigest",
    "digest_pages",
    "is_zero",
    "mask_page",
    "page_lsn",
    "same_page",
    "set_page_lsn",
]
