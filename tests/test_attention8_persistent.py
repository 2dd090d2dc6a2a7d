"""csrc/attention8_persistent.cuh compiled for the CPU (tests/host): its pipeline ends, and multiplies what it should.

The kernel's own source runs on a block of fibers whose copies land and whose warpgroups go on in random order, over
random numbers of items, lists of key tiles of any length, none among them, and fewer items than blocks.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++")
REPLACED = ("hopper.cuh", "e4m3.cuh", "cuda_runtime.h", "cuda_bf16.h", "kernel_info.h")
PERSISTENT, PLAN = "attention8_persistent.cuh", "attention8_plan.cuh"

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def said(folder: Path, runs: int, fault: tuple[str, str, str] | None = None) -> str:
    """The last line of the kernel's source on tests/host. fault: a file, a line of it, and what takes its place."""
    for path in ROOT.glob("csrc/attention8*.*h"):
        text = path.read_text()
        if fault and path.name == fault[0]:
            assert fault[1] in text
            text = text.replace(fault[1], fault[2])
        (folder / path.name).write_text(text)
    for name in REPLACED:
        (folder / name).write_text('#include "machine.h"\n')
    assert COMPILER is not None
    command = [COMPILER, "-std=c++20", "-O0", "-w", "-I", str(folder), "-I", str(ROOT / "tests/host")]
    subprocess.run([*command, "-o", "run", str(ROOT / "tests/host/persistent.cpp")], cwd=folder, check=True)
    done = subprocess.run(
        [str(folder / "run"), "1", str(runs)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode == 0) == (done.stdout == "ok\n"), done
    return done.stdout.strip()


def test_blocks_go_through_their_items(tmp_path: Path) -> None:
    assert said(tmp_path, runs=100) == "ok"


@pytest.mark.parametrize(
    ("file", "line", "instead", "found"),
    [
        (PERSISTENT, "c.pass_turn(!more)", "c.pass_turn(false)", "a turn passed that nobody awaits"),
        (PERSISTENT, "c.arrive(shared.queries_empty(round++));", "++round;", "deadlock"),
        (PERSISTENT, "product_wait<0>(c.out);", "", "a copy into what a product reads"),
        (PERSISTENT, "c.clear();", "", "output of other values"),
        (PLAN, "const int stage = (before + i)", "const int stage = i", "deadlock"),
    ],
)
def test_a_fault_of_the_pipeline_shows(
    tmp_path: Path, file: str, line: str, instead: str, found: str
) -> None:
    assert said(tmp_path, runs=20, fault=(file, line, instead)) == found
