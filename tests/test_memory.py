"""Goal: large messages are not allocated from the kernel anew each time.

Method: a process of its own allocates and frees as a message of pages does, and counts its page
faults.
"""

from __future__ import annotations

import subprocess
import sys

_MESSAGES = 200
_PROGRAM = f"""
import resource, sys
from boreal.memory import keep_freed

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def message():
    pages = [bytes([n]) * 8192 for n in range(64)]
    return len(bytes(bytearray(b"".join(pages))))

if sys.argv[1] == "kept":
    keep_freed()
for _ in range(20):
    message()
before = faults()
for _ in range({_MESSAGES}):
    message()
print(faults() - before)
"""


def _faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_freed_memory_is_used_again_without_the_kernel() -> None:
    assert _faults("kept") < _MESSAGES
    assert _faults("given back") > 10 * _MESSAGES
