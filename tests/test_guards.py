"""What guards a running clip: claims between processes, dead pictures, stop signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cosmos_fast.formats import ClipError
from cosmos_fast.guards import Claim, FrameChecks, StopFlag, Stopped
from cosmos_fast.outputs import OutputFolder

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    return OutputFolder(tmp_path / "out")


def names(folder: OutputFolder) -> set[str]:
    return {p.name for p in folder.root.iterdir()} - {".lock"}


# ------------------------------------------------------------------------------------------- claims

HOLD = (
    "import sys, time\nfrom cosmos_fast.outputs import OutputFolder\nfrom cosmos_fast.guards import Claim\n"
    "f = OutputFolder(sys.argv[1])\nclip = f.clip('clip')\nclaim = Claim.take(clip.claim_path, f.locked)\n"
    "print(claim is not None, flush=True)\ntime.sleep(60)"
)


def test_claim_is_exclusive_and_comes_back(folder: OutputFolder) -> None:
    path = folder.clip("clip").claim_path
    with Claim.take(path, folder.locked) or pytest.fail("free claim refused") as claim:
        assert claim.held() and path.exists()
        assert Claim.take(path, folder.locked) is None
    assert not path.exists() and names(folder) == set()


def test_claim_of_a_killed_process_is_taken_over_at_once(folder: OutputFolder) -> None:
    path = folder.clip("clip").claim_path
    job = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.root)], env=ENV, stdout=subprocess.PIPE)
    try:
        assert job.stdout is not None and job.stdout.readline() == b"True\n"
        assert Claim.take(path, folder.locked) is None
    finally:
        job.kill()
        job.wait()
    claim = Claim.take(path, folder.locked)
    assert claim is not None and claim.held()
    claim.release()


def test_claim_of_another_host_goes_stale_by_its_heartbeat_alone(folder: OutputFolder) -> None:
    path = folder.clip("clip").claim_path
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "process": "pid:[1] 5", "token": "t"}))
    assert Claim.take(path, folder.locked, stale_s=60) is None
    os.utime(path, (time.time() - 61,) * 2)
    claim = Claim.take(path, folder.locked, stale_s=60)
    assert claim is not None
    claim.release()


def test_heartbeat_keeps_a_claim_and_a_lost_one_is_noticed(folder: OutputFolder) -> None:
    path = folder.clip("clip").claim_path
    claim = Claim.take(path, folder.locked, stale_s=0.5)
    assert claim is not None
    os.utime(path, (1.0, 1.0))
    deadline = time.monotonic() + 5
    while path.stat().st_mtime == 1.0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.stat().st_mtime > 1.0

    other = json.loads(path.read_text()) | {"token": "someone else's"}
    path.write_text(json.dumps(other))
    assert not claim.held()
    claim.release()
    assert path.exists()  # it is the other's now


def test_one_of_many_contenders_takes_a_stale_claim(folder: OutputFolder) -> None:
    path = folder.clip("clip").claim_path
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "process": "pid:[1] 5", "token": "t"}))
    os.utime(path, (1.0, 1.0))
    jobs = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(folder.root)], env=ENV, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    try:
        answers = sorted(job.stdout.readline() for job in jobs if job.stdout)
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert answers == [b"False\n", b"False\n", b"True\n"]
    assert not [n for n in names(folder) if n != ".clip.claim"]


# -------------------------------------------------------------------------------------- frame checks


def moving(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 24, 32, 3), dtype=np.uint8)


def still(n: int, value: int | None = None) -> np.ndarray:
    frame = moving(1, 9) if value is None else np.full((1, 24, 32, 3), value, np.uint8)
    return np.repeat(frame, n, axis=0)


def run_checks(
    frames: np.ndarray, source: np.ndarray | None = None, step: int = 4, **options: object
) -> FrameChecks:
    checks = FrameChecks("clip", len(frames), (32, 24), **options)  # type: ignore[arg-type]
    for i in range(0, len(frames), step):
        checks.update(frames[i : i + step], None if source is None else source[i : i + step])
    return checks


def test_a_moving_clip_passes_whatever_its_parts() -> None:
    frames = moving(20)
    figures = [run_checks(frames, step=step, seams=(10,)).finish() for step in (1, 3, 20)]
    assert figures[0] == figures[1] == figures[2]
    assert figures[0]["frames"] == 20 and figures[0]["identical_frames_longest"] == 1


@pytest.mark.parametrize(("value", "what"), [(0, "black"), (128, "one colour"), (255, "one colour")])
def test_flat_output_fails_unless_the_source_is_flat(value: int, what: str) -> None:
    dithered = still(12, value) + (np.arange(12) % 2).astype(np.uint8)[:, None, None, None] * (
        1 if value < 255 else 0
    )
    with pytest.raises(ClipError, match=f"got {what} from frame 0 on"):
        run_checks(dithered, moving(12))
    with pytest.raises(ClipError, match=f"got {what} in every frame"):
        run_checks(still(3, value), moving(3)).finish()
    run_checks(dithered, still(12, 7)).finish()
    run_checks(np.concatenate([still(7, value), moving(5)]), moving(12)).finish()  # a short fade is no fault
    with pytest.raises(ClipError, match="from frame 6 on"):
        run_checks(np.concatenate([moving(6), dithered]), moving(18))


def test_a_small_bright_object_on_black_is_a_picture() -> None:
    frames = still(9, 0)
    for i in range(9):
        frames[i, 3 + i : 6 + i, 5:8] = 200
    run_checks(frames, moving(9)).finish()


def test_frozen_output_fails_unless_the_source_is_frozen_too() -> None:
    frames = np.concatenate([moving(5), still(8), moving(3, 1)])
    with pytest.raises(ClipError, match=r"8 identical \(frozen\) frames up to frame 12"):
        run_checks(frames, moving(16))
    with pytest.raises(ClipError, match="frozen"):
        run_checks(frames)
    assert run_checks(frames, np.concatenate([moving(5, 2), still(8), moving(3, 2)])).finish()["frames"] == 16
    assert (
        run_checks(np.concatenate([moving(5), still(7)]), moving(12)).finish()["identical_frames_longest"]
        == 7
    )
    doubled = np.repeat(
        moving(10, 3), 2, axis=0
    )  # a 15 fps source stored at 30 does not excuse a frozen result
    with pytest.raises(ClipError, match="frozen"):
        run_checks(still(20), doubled)


def test_count_size_and_kind_must_match() -> None:
    checks = FrameChecks("clip", 9, (32, 24))
    checks.update(moving(8))
    with pytest.raises(ClipError, match="must have 9 frames, got 8"):
        checks.finish()
    with pytest.raises(ClipError, match="uint8 24x32 RGB, got uint8 of shape"):
        FrameChecks("clip", 9, (24, 32)).update(moving(1))
    with pytest.raises(ClipError, match="got float32"):
        FrameChecks("clip", 9, (32, 24)).update(moving(1).astype(np.float32))
    with pytest.raises(ValueError, match="source must match"):
        checks.update(moving(2), moving(1))


def test_a_jump_at_a_seam_is_a_note() -> None:
    ramp = np.stack([np.roll(moving(1, 4)[0] // 4, 0) + i for i in range(20)]).astype(np.uint8)
    ramp[10:] += 60
    checks = run_checks(ramp, moving(20), seams=(10, 15))
    figures = checks.finish()
    assert figures["median_frame_difference"] == 1.0
    assert figures["seam_differences"] == {10: 61.0, 15: 1.0}
    assert len(checks.notes) == 1 and "into frame 10 is 61.0 times" in checks.notes[0]


# ------------------------------------------------------------------------------------------ signals

STOP = (
    "import os, signal, sys, time\nfrom cosmos_fast.guards import StopFlag, Stopped\n"
    "with StopFlag(30) as stop:\n"
    "  print('ready', flush=True)\n  while not stop.requested: time.sleep(0.005)\n"
    "  stop.check(remaining_s=1)\n  print('asked', flush=True)\n  if sys.argv[1] == 'wait': time.sleep(30)\n"
    "  try: stop.check()\n  except Stopped as e: sys.exit(e.exit_code)"
)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]
)
def test_first_signal_asks_and_second_kills(number: signal.Signals, code: int) -> None:
    for mode, expected in (("go", code), ("wait", -number)):
        job = subprocess.Popen([sys.executable, "-c", STOP, mode], env=ENV, stdout=subprocess.PIPE)
        assert job.stdout is not None and job.stdout.readline() == b"ready\n"
        job.send_signal(number)
        assert job.stdout.readline() == b"asked\n"
        if mode == "wait":
            job.send_signal(number)
        assert job.wait(timeout=20) == expected


def test_grace_decides_whether_the_clip_may_finish() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopFlag(grace_s=5) as stop:
        stop.check()
        assert stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        stop.check(remaining_s=2)
        with pytest.raises(Stopped) as caught:
            stop.check(remaining_s=6)
        assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGUSR1) == before
    with pytest.raises(ValueError, match="grace"):
        StopFlag(-1)
