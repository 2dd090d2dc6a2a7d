"""GPU tests at small sizes under compute-sanitizer: `make sanitize`, or `python tools/sanitize.py -k adaln`.

Runs memcheck, synccheck and initcheck over the tests marked gpu; racecheck is left out, because it reports correct
uses of the bulk copy engine. Exits non-zero at the first tool that finds an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "synccheck", "initcheck")


def find() -> str | None:
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def main(arguments: list[str]) -> int:
    sanitizer = find()
    if sanitizer is None:
        print(
            "sanitize: compute-sanitizer not found. Install the CUDA toolkit or set CUDA_HOME.",
            file=sys.stderr,
        )
        return 3
    # Production shapes take hours under the tools, and a caching allocator hides writes between tensors.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "gpu and not slow"]
    tests += ["-k", "not 84480 and not production"] if "-k" not in arguments else []
    for tool in TOOLS:
        print(f"=== {tool}", flush=True)
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
        done = subprocess.run([*command, *tests, *arguments], cwd=ROOT, env=env)
        if done.returncode == 5:
            print("sanitize: no gpu test was selected", file=sys.stderr)
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
