"""Start a program that belongs to nobody: `python -I -S detach.py LOG PROGRAM ARGUMENT...`.

Prints the program's process id. The program is in a session of its own, reads nothing, appends
what it says to LOG, and is a child of init, not of its starter: else whoever kills the starter with
its children would kill the program too. A file of its own because it must not import anything: it
runs in a fresh interpreter without site-packages, in about 10 ms. (A process with gRPC's threads
must not fork by itself.)
"""

import os
import sys


def main(log: str, program: list[str]) -> None:
    """Fork, tell the child's pid, and become the program in the child."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    child = os.fork()
    if child:
        os.write(1, str(child).encode())
        return
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.closerange(3, 64)
    try:
        os.execvp(program[0], program)  # noqa: S606 - starting programs is the purpose
    except OSError as error:
        os.write(2, f"cannot run {program[0]}: {error}\n".encode())
        os._exit(127)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
