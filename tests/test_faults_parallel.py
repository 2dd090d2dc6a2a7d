"""Ranks that die, raise, run out of memory or hang, and a parent that is told to stop: the end comes soon, says why,
keeps what was finished and leaves nothing half written. Processes on the CPU; the exchange between them is gloo's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
from system import ENV, ROOT, Run, clip_of, digests, generate, generate_arguments, leftovers, write_spec

from cosmos_fast import launch, team_store

pytestmark = pytest.mark.slow
STEPS = 3
SOON_S = 30.0
SHARED = ("--gpus", "2", "--cfg", "2", "--context", "1")

# Two ranks share each clip's guidance passes. A fault comes in the second step of its clip, while the other rank waits;
# new ranks go on with the next clip.
FAULTS = {
    "b": ("0:1:5:raise", "rank 1 (2 in all): RuntimeError: a fault made for a test (at faulty_rank.py:"),
    "c": ("1:1:2:memory", "rank 1 (2 in all): out of GPU memory."),
    "e": ("2:0:5:kill", "rank 0 (2 in all) was killed by SIGKILL."),
    "g": ("3:1:5:sleep", "no step ended for "),
}
DONE, SLOW = "adf", "h"


@dataclass(frozen=True)
class Ordeal:
    """One run through every fault in turn, the last clip stopped by a signal to the parent."""

    folder: Path
    specs: dict[str, Path]
    run: Run
    lines: list[str]
    stop_s: float

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def manifest(self) -> dict[str, dict[str, str]]:
        lines = (self.out / "manifest.jsonl").read_text().splitlines()
        return {line["name"]: line for line in map(json.loads, lines)}


def ask_to_stop(out: Path, asked: list[float]) -> None:
    """SIGTERM to this process, the parent, once the slow clip is on its way."""
    until = time.monotonic() + 200
    while not (out / f".{SLOW}.claim").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)
    asked.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def ordeal(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Ordeal:
    folder = tmp_path_factory.mktemp("ordeal")
    clip = clip_of(folder / "street.mp4", 5)
    specs = {
        name: write_spec(
            folder, name, clip, num_video_frames_per_chunk=1, num_steps=250 if name == SLOW else STEPS
        )
        for name in sorted((*DONE, *FAULTS, SLOW))
    }
    asked: list[float] = []
    asking = threading.Thread(target=ask_to_stop, args=(folder / "out", asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "COMMAND", (sys.executable, str(ROOT / "tests" / "faulty_rank.py")))
        patch.setattr(team_store.Pulse.__init__, "__defaults__", (4.0,))
        faults = " ".join(fault for fault, _ in FAULTS.values())
        environment = {
            "FAULTS": faults,
            "LOG": str(folder / "log"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        for key, value in environment.items():
            patch.setenv(key, value)
        asking.start()
        run = generate(models, folder / "out", *specs.values(), *SHARED)
    ended = time.monotonic()
    assert run.code == 143, run
    asking.join()
    stop_s = ended - asked[0]
    lines = [*run.err.splitlines(), *(folder / "log").read_text().splitlines()]
    return Ordeal(folder, specs, run, lines, stop_s)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_its_clip_and_is_told_once_and_soon(ordeal: Ordeal, name: str) -> None:
    fault, reason = FAULTS[name]
    told = [line.removeprefix("[ranks 0-1] ") for line in ordeal.lines if f"{name}: failed" in line]
    assert len(told) == 1 and told[0].startswith(f"{name}: failed: {reason}"), ordeal.lines
    record = ordeal.manifest()[name]
    assert record["status"] == "failed" and record["reason"].startswith(reason)
    happened = float((ordeal.folder / f"{fault.rpartition(':')[2]}.time").read_text())
    assert datetime.fromisoformat(record["time"]).timestamp() - happened < SOON_S


def test_a_rank_that_sleeps_is_found_where_it_sleeps(ordeal: Ordeal) -> None:
    assert "rank 1 at faulty_rank.py:" in ordeal.manifest()["g"]["reason"]


def test_other_clips_are_made_as_ever(ordeal: Ordeal, models: Path) -> None:
    done = {f"{name}{suffix}.jpg" for name in DONE for suffix in ("", "_control_edge")}
    assert set(digests(ordeal.out)) == done and leftovers(ordeal.out) == []
    assert {name for name, line in ordeal.manifest().items() if line["status"] == "done"} == set(DONE)
    assert ordeal.run.paths == [ordeal.out / f"{name}.jpg" for name in DONE]
    assert generate(models, ordeal.folder / "alone", ordeal.specs["a"]).code == 0
    alone = digests(ordeal.folder / "alone")
    assert alone == {name: digests(ordeal.out)[name] for name in alone}


def test_lost_ranks_are_started_anew_and_only_those(ordeal: Ordeal) -> None:
    anew = [line for line in ordeal.lines if "started anew" in line]
    assert anew == ["ranks 0-1: started anew for the clips that are left"] * 4
    assert not any("Traceback" in line for line in ordeal.lines), ordeal.lines


def test_a_stop_request_reaches_every_rank(ordeal: Ordeal) -> None:
    assert ordeal.run.code == 143 and ordeal.stop_s < SOON_S
    assert sum("stopped on request" in line for line in ordeal.lines) == 1
    assert SLOW not in ordeal.manifest()


def test_what_concerns_every_clip_ends_the_run_with_one_message(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_spec(tmp_path, "a", clip_of(tmp_path / "street.mp4", 5), num_video_frames_per_chunk=1)
    broken = tmp_path / "broken.pth"
    broken.write_bytes((models / "tokenizer.pth").read_bytes()[:2000])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = generate(models, tmp_path / "out", spec, "--vae", broken, *SHARED)
    assert run.code == 3 and not run.out and run.err.count("error:") == 1 and "broken.pth" in run.err, run
    assert digests(tmp_path / "out") == {} and leftovers(tmp_path / "out") == []


def test_ranks_do_not_outlive_their_parent(models: Path, tmp_path: Path) -> None:
    clip = clip_of(tmp_path / "street.mp4", 5)
    spec = write_spec(tmp_path, SLOW, clip, num_video_frames_per_chunk=1, num_steps=250)
    arguments = generate_arguments(models, tmp_path / "out", spec, *SHARED)
    parent = subprocess.Popen(
        [sys.executable, "-m", "cosmos_fast.cli", *arguments], env=ENV, stderr=subprocess.DEVNULL
    )
    claim, until = tmp_path / "out" / f".{SLOW}.claim", time.monotonic() + 150
    while not (claim.exists() and claim.stat().st_size) and time.monotonic() < until:
        time.sleep(0.05)
    leader = Path(f"/proc/{json.loads(claim.read_text())['pid']}")
    assert leader.exists()
    parent.kill()
    parent.wait()
    until = time.monotonic() + SOON_S
    while leader.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not leader.exists()
