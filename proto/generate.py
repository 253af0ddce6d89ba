"""Make boreal/rpc/*_pb2* from proto/*.proto; with --check, fail if they are out of date."""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUBS = ROOT / "boreal" / "rpc"


def generate(into: Path) -> None:
    """Run protoc so that imports read `boreal.rpc.storage_pb2`."""
    sources = sorted(str(path) for path in (ROOT / "proto").glob("*.proto"))
    plugins = Path(sys.executable).parent
    outputs = [f"--{kind}_out={into}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{into}" for kind in ("mypy", "mypy_grpc")]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-Iboreal/rpc={ROOT / 'proto'}",
            *outputs,
            *sources,
        ],
        check=True,
        env={**os.environ, "PATH": f"{plugins}{os.pathsep}{os.environ['PATH']}"},
    )


def main() -> int:
    """Regenerate, or check."""
    if "--check" not in sys.argv[1:]:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = sorted((Path(scratch) / "boreal" / "rpc").iterdir())
        stale = [
            path.name
            for path in fresh
            if not (STUBS / path.name).exists()
            or not filecmp.cmp(path, STUBS / path.name, shallow=False)
        ]
    if stale:
        sys.stderr.write(f"stubs are out of date, run `make proto`: {', '.join(stale)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
