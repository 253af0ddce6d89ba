"""PostgreSQL's relation files as they lie on disk: all segments, without reading holes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from boreal.types import PAGE_BYTES, RELATION_SEGMENT_BLOCKS, Fork, RelationFork

_DEFAULT_TABLESPACE, _GLOBAL_TABLESPACE = 1663, 1664
_FORKS = {"": Fork.MAIN, "fsm": Fork.FSM, "vm": Fork.VM, "init": Fork.INIT}


class RelationFiles:
    """Every fork of every relation in a data directory, but for temporary ones."""

    def __init__(self, data: Path) -> None:
        self.forks: defaultdict[RelationFork, dict[int, Path]] = defaultdict(dict)
        """The files of each fork by the number of the segment."""
        self._add(_GLOBAL_TABLESPACE, 0, data / "global")
        for directory in (data / "base").iterdir():
            if directory.name.isdigit():
                self._add(_DEFAULT_TABLESPACE, int(directory.name), directory)

    def _add(self, tablespace: int, database: int, directory: Path) -> None:
        for path in directory.iterdir():
            name, _, segment = path.name.partition(".")
            number, _, suffix = name.partition("_")
            if number.isdigit() and suffix in _FORKS:
                fork = RelationFork(tablespace, database, int(number), _FORKS[suffix])
                self.forks[fork][int(segment or 0)] = path

    def blocks(self, fork: RelationFork) -> int:
        """The fork's length; 0 if there is none."""
        files = self.forks.get(fork)
        if not files:
            return 0
        last = max(files)
        return last * RELATION_SEGMENT_BLOCKS + files[last].stat().st_size // PAGE_BYTES

    def pages(self, fork: RelationFork) -> Iterator[tuple[int, bytes]]:
        """Block number and content of every page that lies outside of a file's holes."""
        for segment, path in sorted(self.forks[fork].items()):
            first = segment * RELATION_SEGMENT_BLOCKS
            for at, content in _extents(path):
                for offset in range(0, len(content), PAGE_BYTES):
                    block = first + (at + offset) // PAGE_BYTES
                    yield block, content[offset : offset + PAGE_BYTES]


def _extents(path: Path) -> Iterator[tuple[int, bytes]]:
    """Where data lies in the file, page by page at least, and the data."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        at = 0
        while at < end:
            try:
                begin = file.seek(at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole until the end
                return
            hole = file.seek(begin, os.SEEK_HOLE)
            begin -= begin % PAGE_BYTES
            at = hole + -hole % PAGE_BYTES
            file.seek(begin)
            yield begin, file.read(at - begin)
