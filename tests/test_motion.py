"""A rank that hangs outside the steps is found by doing nothing; one that works, however long, is not."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from system import ROOT, clip_of, digests, generate, leftovers, write_spec

from cosmos_fast import launch, motion
from cosmos_fast.motion import Motion, place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no rank is thought to hang")
SAMPLES, PAUSE_S = 5, 0.1
MUCH = bytes(64 << 20)


def stillness(work: Callable[[], object], waits: bool = False) -> float:
    """What a thread beside the main one sees while that works for 0.5 s or so."""
    found: list[float] = []

    def watch() -> None:
        seen = Motion()
        for _ in range(SAMPLES):
            time.sleep(PAUSE_S)
            found.append(seen.still_s(waits))

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    thread.join()
    return found[-1]


def busy() -> None:
    """One instruction that takes long, others running beside it."""
    until = time.monotonic() + 1.1 * SAMPLES * PAUSE_S
    while time.monotonic() < until:
        hashlib.sha256(MUCH)


def read_much() -> None:
    with open("/dev/zero", "rb", buffering=0) as zeros:
        until = time.monotonic() + SAMPLES * PAUSE_S
        while time.monotonic() < until:
            zeros.read(4 << 20)
            time.sleep(0.05)


def test_what_does_nothing_is_still() -> None:
    assert stillness(lambda: time.sleep(1.2 * SAMPLES * PAUSE_S)) > (SAMPLES - 2) * PAUSE_S
    lock = threading.Lock()
    lock.acquire()
    assert stillness(lambda: lock.acquire(timeout=1.2 * SAMPLES * PAUSE_S)) > (SAMPLES - 2) * PAUSE_S


@pytest.mark.parametrize(
    "work",
    [
        busy,
        read_much,
        lambda: subprocess.run([sys.executable, "-c", f"import time; time.sleep({1.2 * SAMPLES * PAUSE_S})"]),
    ],
    ids=["a long instruction", "reading", "waiting for a child"],
)
def test_what_works_moves(work: Callable[[], object]) -> None:
    assert stillness(work) < 3 * PAUSE_S


def test_work_in_another_thread_counts() -> None:
    other = threading.Thread(target=busy)
    other.start()
    assert stillness(lambda: time.sleep(0.5)) < 3 * PAUSE_S or not other.is_alive()
    other.join()


def module(name: str) -> dict[str, Callable[..., object]]:
    """A module of that name, with a wait and a call of something else."""
    found: dict[str, object] = {"__name__": name, "time": time}
    exec(f"def wait(): time.sleep({1.2 * SAMPLES * PAUSE_S})\ndef call(work): work()", found)
    return found  # type: ignore[return-value]


def test_an_exchange_waits_but_what_it_calls_may_hang() -> None:
    assert stillness(module("cosmos_fast.parallel")["wait"]) < 2 * PAUSE_S
    assert stillness(module("torch.distributed.distributed_c10d")["wait"]) < 2 * PAUSE_S
    hangs = module("cosmos_fast.engine")["wait"]
    assert stillness(lambda: module("cosmos_fast.parallel")["call"](hangs)) > (SAMPLES - 2) * PAUSE_S


def test_who_waits_for_what_another_rank_reads_is_not_still() -> None:
    """A rank that reads for itself may hang there, and so may one that only happens to hear of the next chunk."""
    reads, hears = module("cosmos_fast.reading")["wait"], module("cosmos_fast.neighbours")["wait"]
    elsewhere = module("cosmos_fast.engine")["wait"]
    for main, beside, is_still in ((reads, hears, False), (reads, elsewhere, True), (elsewhere, hears, True)):
        other = threading.Thread(target=beside)
        other.start()
        assert (stillness(main) > 2 * PAUSE_S) == is_still
        other.join()


def test_who_waits_is_not_still() -> None:
    assert stillness(lambda: time.sleep(1.2 * SAMPLES * PAUSE_S), waits=True) < 2 * PAUSE_S


def test_elsewhere_everything_moves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(motion, "PROC", tmp_path / "none")
    assert stillness(lambda: time.sleep(0.5)) == 0.0


def test_a_place_names_the_innermost_frame() -> None:
    assert place(sys._getframe()).startswith("test_motion.py:") and place(None) == "nowhere"


@pytest.mark.parametrize("rank, where", [(1, "decode"), (0, "read")])
def test_a_rank_that_hangs_outside_the_steps_costs_its_clip(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, where: str
) -> None:
    """What rank 0 reads rank 1 waits for, and is not taken for the one that hangs."""
    clip = clip_of(tmp_path / "street.mp4", 5)
    spec = write_spec(tmp_path, "a", clip, num_video_frames_per_chunk=1)
    monkeypatch.setattr(launch, "COMMAND", (sys.executable, str(ROOT / "tests" / "faulty_rank.py")))
    environment = {
        "FAULTS": f"0:{rank}:{where}:sleep", "STILL": "3", "LOG": str(tmp_path / "log"), "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    run = generate(models, tmp_path / "out", spec, "--gpus", "2", "--cfg", "2", "--context", "1")
    assert run.code == 1 and run.paths == [], run
    (line,) = (json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    assert (
        line["reason"].startswith(f"rank {rank} (2 in all) did nothing for ")
        and {"decode": "faulty_rank.py:", "read": "reading.py:"}[where] in line["reason"]
    )
    assert sum(": failed: " in line for line in run.err.splitlines()) == 1, run.err
    happened = (tmp_path / "sleep.time").stat().st_mtime
    assert datetime.fromisoformat(line["time"]).timestamp() - happened < 30
    assert digests(tmp_path / "out") == {} and leftovers(tmp_path / "out") == []
