"""What pages look like inside, as far as storage must know. Pure.

`layout` is what all pages share, `visibility` the visibility map, `masks` what may differ between
copies of a page that are the same to PostgreSQL, `compare` what `boreal verify` asks.
"""

from boreal.pages.compare import same_page
from boreal.pages.layout import HEADER_BYTES, PageHeader, is_zero, page_lsn, set_page_lsn
from boreal.pages.masks import PageKind, mask_page

__all__ = [
    "HEADER_BYTES",
    "PageHeader",
    "PageKind",
    "is_zero",
    "mask_page",
    "page_lsn",
    "same_page",
    "set_page_lsn",
]
