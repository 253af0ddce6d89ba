"""How far each of a node's two processes has come with a volume: a small file both have mapped.

The log process publishes what the log holds, the page process what it has indexed. Every field is
one aligned 8-byte word with a single writer, stored and loaded whole (a memoryview of format `Q`
copies a word at a time), so a reader sees an old value or a new one, never a mixture. Two fields
read one after the other may be of different moments: `vdl` may be ahead of an `scl` read before it.

The file holds nothing that must survive: after a crash each process writes its fields anew.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Self

from boreal.errors import CorruptData
from boreal.types import Epoch, Lsn

_MAGIC = int.from_bytes(b"BOREALS1", "little")
_FILE_BYTES = 4096
_FAILURE_OFFSET = 1024
_FAILURE_LIMIT_BYTES = 1024

# Word numbers. Written by the log process:
_MAGIC_WORD, _PROMISED, _START, _SCL, _VDL, _PGMRPL = range(6)
_GENERATION, _DROPPED, _LINEAGE_EPOCH, _FLOOR = range(7, 11)
# Written by the page process:
_INDEXED, _FAILURE_SEQUENCE, _FAILURE_BYTES, _RETIRED = range(16, 20)


class SharedState:
    """The mapped file of one volume.

    Use the setters only in the process the section names; whoever opens it may read everything.
    """

    def __init__(self, path: Path) -> None:
        """Map an existing file; CorruptData if it is none of ours."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size != _FILE_BYTES:
                raise CorruptData(f"{path} is not a shared state file")
            self._map = mmap.mmap(descriptor, _FILE_BYTES)
        finally:
            os.close(descriptor)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        if self._words[_MAGIC_WORD] != _MAGIC:
            self.close()
            raise CorruptData(f"{path} is not a shared state file")

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make the file anew, all fields zero. Those who still map an older one keep that one."""
        scratch = path.with_name(path.name + ".new")
        scratch.write_bytes(_MAGIC.to_bytes(8, "little") + bytes(_FILE_BYTES - 8))
        scratch.replace(path)
        return cls(path)

    def close(self) -> None:
        """Unmap."""
        self._words.release()
        self._bytes.release()
        self._map.close()

    # --- written by the log process ------------------------------------------------------------

    @property
    def promised(self) -> Epoch:
        """The epoch this segment promised: refuse callers of an older one."""
        return Epoch(self._words[_PROMISED])

    @promised.setter
    def promised(self, epoch: Epoch) -> None:
        self._words[_PROMISED] = epoch

    @property
    def lineage_epoch(self) -> Epoch:
        """The last epoch of the adopted lineage; raised once the log is cut to that lineage."""
        return Epoch(self._words[_LINEAGE_EPOCH])

    @lineage_epoch.setter
    def lineage_epoch(self, epoch: Epoch) -> None:
        self._words[_LINEAGE_EPOCH] = epoch

    @property
    def start(self) -> Lsn:
        """The log's first byte."""
        return Lsn(self._words[_START])

    @start.setter
    def start(self, lsn: Lsn) -> None:
        self._words[_START] = lsn

    @property
    def scl(self) -> Lsn:
        """Every byte in [start, scl) is here, durably. Shrinks when the log is cut."""
        return Lsn(self._words[_SCL])

    @scl.setter
    def scl(self, lsn: Lsn) -> None:
        self._words[_SCL] = lsn

    @property
    def vdl(self) -> Lsn:
        """The highest VDL told to this segment, at most its SCL."""
        return Lsn(self._words[_VDL])

    @vdl.setter
    def vdl(self, lsn: Lsn) -> None:
        self._words[_VDL] = lsn

    @property
    def pgmrpl(self) -> Lsn:
        """No instance reads below it again; 0: unknown."""
        return Lsn(self._words[_PGMRPL])

    @pgmrpl.setter
    def pgmrpl(self, lsn: Lsn) -> None:
        self._words[_PGMRPL] = lsn

    @property
    def floor(self) -> Lsn:
        """Nobody asks for a page as of an LSN below it, and no bundle starts below it; 0: unknown.

        Only ever grows. The page process may forget what only older states of pages need.
        """
        return Lsn(self._words[_FLOOR])

    @floor.setter
    def floor(self, lsn: Lsn) -> None:
        self._words[_FLOOR] = lsn

    @property
    def generation(self) -> int:
        """Grows whenever bytes of the log were discarded, after `scl` was lowered.

        Complete records at or below a VDL always stay. Whoever holds other bytes read under an
        older generation (the beginning of an unfinished record) must drop them and read again.
        """
        return self._words[_GENERATION]

    @generation.setter
    def generation(self, count: int) -> None:
        self._words[_GENERATION] = count

    @property
    def dropped(self) -> bool:
        """The volume is being removed: close everything of it."""
        return bool(self._words[_DROPPED])

    @dropped.setter
    def dropped(self, gone: bool) -> None:
        self._words[_DROPPED] = gone

    # --- written by the page process -----------------------------------------------------------

    @property
    def indexed(self) -> Lsn:
        """The end of the last record in the index; 0 before there is one."""
        return Lsn(self._words[_INDEXED])

    @indexed.setter
    def indexed(self, lsn: Lsn) -> None:
        self._words[_INDEXED] = lsn

    @property
    def retired(self) -> Lsn:
        """The page process needs no byte of the log below it, durably; 0: it may need every one.

        The log process makes it 0 before a page process starts.
        """
        return Lsn(self._words[_RETIRED])

    @retired.setter
    def retired(self, lsn: Lsn) -> None:
        self._words[_RETIRED] = lsn

    @property
    def failure(self) -> str:
        """Why the index does not go on; empty in health."""
        # A seqlock: the writer makes the sequence odd while it is at it. One that died half-way
        # leaves it odd; its successor's first write heals that.
        for _ in range(100):
            before = self._words[_FAILURE_SEQUENCE]
            length = min(self._words[_FAILURE_BYTES], _FAILURE_LIMIT_BYTES)
            text = bytes(self._bytes[_FAILURE_OFFSET : _FAILURE_OFFSET + length])
            if before % 2 == 0 and self._words[_FAILURE_SEQUENCE] == before:
                return text.decode(errors="replace")
        return "the page process is changing its report"

    @failure.setter
    def failure(self, text: str) -> None:
        data = text.encode()[:_FAILURE_LIMIT_BYTES]
        odd = self._words[_FAILURE_SEQUENCE] | 1
        self._words[_FAILURE_SEQUENCE] = odd
        self._bytes[_FAILURE_OFFSET : _FAILURE_OFFSET + len(data)] = data
        self._words[_FAILURE_BYTES] = len(data)
        self._words[_FAILURE_SEQUENCE] = odd + 1
