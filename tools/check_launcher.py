"""`cosmos-fast generate --gpus 2` on the GPUs of this machine: ways to share clips, then ranks that fail on purpose.

    python tools/check_launcher.py --out check.json                  two GPUs, the embedded model, below 150 s
    python tools/check_launcher.py --out check.json --device cpu     the same with processes on the CPU
    python tools/check_launcher.py --out check.json --quick          faults alone, each in a run of its own, below 100 s

One GPU makes every clip first. Two GPUs must then give the same bytes with a clip each. With a guidance pass each the latents are the
same, but each GPU decodes half of the rows, as with shared tokens: those clips may differ by rounding. In the last run rank 1 raises, rank
1 asks for more memory than there is, and rank 0 is killed, each in the third step of a clip; every end must come within 30 s
with one message, and the clips around it be made. --hang: rank 1 also stops for good while decoding, 25 s more. --quick: those
runs side by side, a fault and then a sound clip in each. A line per check, JSON at the end, exit code 1 if one fails. What is over its time is killed and counts as failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench")]

from records import environment  # noqa: E402

CLIP = ROOT / "examples" / "clips" / "table.mp4"
STEPS, FAULTY_STEP = 5, 3
SOUND = "sound"
"""Ending of the names of clips that nothing happens to."""
SOON_S = 30.0
FAULTS = "CHECK_LAUNCHER_FAULTS"
"""Set for the run that fails: a JSON list of [generation of the group, rank, what]."""
LEAST_PSNR = 30.0
"""dB of clips that two GPUs made together: rounding in bf16, nothing else, is between them and those of one GPU."""


# --- one process of a run that fails -----------------------------------------------------------------


def fail(what: str, device: Any) -> None:
    """In the middle of a step, or for "hang" of a decode."""
    (Path(os.environ["CHECK_LAUNCHER_FOLDER"]) / f"{what}.time").write_text(str(time.time()))
    if what == "raise":
        raise RuntimeError("a fault made on purpose")
    if what == "memory":
        import torch

        if device.type == "cpu":
            raise torch.OutOfMemoryError("out of memory, as told to")
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    if what == "hang":
        time.sleep(1000)
    os.kill(os.getpid(), signal.SIGKILL)


def arm(faults: list[list[Any]]) -> None:
    """Make this process fail as told, in the exchange of an attention after FAULTY_STEP - 1 steps of a clip."""
    from cosmos_fast import exchange, team, vae_split

    rank, steps, plan = int(os.environ["RANK"]), 0, ""
    enter, begin, work = team.Team.enter, team.Team._begin, team.Team._work
    attend, frames = exchange.Exchanged.__call__, vae_split.SharedVAEStage._frames

    def entered(self: Any, layout: Any) -> None:
        nonlocal plan
        enter(self, layout)
        plan = next((what for when, who, what in faults if (when, who) == (self.generation, rank)), "")

    def begun(self: Any, clip: Any) -> None:
        nonlocal steps
        steps = -1000 if clip.name.endswith(SOUND) else 0
        begin(self, clip)

    def worked(self: Any) -> None:
        nonlocal steps
        steps += 1
        work(self)

    def attended(self: Any, qkv: Any, *rest: Any) -> Any:
        if plan not in ("", "hang") and steps == FAULTY_STEP - 1:
            fail(plan, qkv.device)
        return attend(self, qkv, *rest)

    def decoded(self: Any, z: Any) -> Any:
        if plan == "hang" and steps > 0:
            fail(plan, z.device)
        return frames(self, z)

    team.Team.enter, team.Team._begin, team.Team._work = entered, begun, worked  # type: ignore[method-assign]
    exchange.Exchanged.__call__, vae_split.SharedVAEStage._frames = attended, decoded  # type: ignore[method-assign]


def command() -> None:
    """The command line as this script is started for the run that fails: the parent, or one of its ranks."""
    sys.path.insert(0, str(ROOT))
    from cosmos_fast import launch, testing
    from cosmos_fast.cli import main

    testing.kernels_from_checkout()
    if "RANK" in os.environ:
        arm(json.loads(os.environ[FAULTS]))
    launch.COMMAND = (sys.executable, str(Path(__file__).resolve()), "--command")
    sys.argv = ["cosmos-fast", *sys.argv[2:]]
    main()


# --- the checks --------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a call of the command gave back."""

    out: Path
    code: int
    lines: list[str]
    seconds: float

    def digests(self) -> dict[str, str]:
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.out.glob("*.mp4"))
        }

    def manifest(self) -> dict[str, dict[str, Any]]:
        path = self.out / "manifest.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return {line["name"]: line for line in map(json.loads, lines)}


@dataclass
class Check:
    """Runs under one deadline, and what was found of them."""

    args: argparse.Namespace
    folder: Path
    started: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def generate(self, name: str, specs: Path, *options: str, faults: Sequence[Any] = ()) -> Run:
        out, start = self.folder / name, time.monotonic()
        given = ["generate", str(specs), "-o", str(out), "--model", "edge", "--no-guardrails", *options, "-q"]
        given += ["--device", "cpu", "--recipe", "fp32"] if self.args.device == "cpu" else []
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "NCCL_NVLS_ENABLE": "0", FAULTS: json.dumps(faults), "CHECK_LAUNCHER_FOLDER": str(self.folder),
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--command", *given], env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=(self.folder / f"{name}.log").open("w"),
        )  # fmt: skip
        try:
            process.wait(max(1.0, self.args.deadline_s - (start - self.started)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its ranks die with it
            process.wait()
        lines = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return Run(out, process.returncode, lines, time.monotonic() - start)

    def tell(self, name: str, ok: bool, **found: Any) -> None:
        row = {"check": name, "ok": bool(ok), **found}
        self.rows.append(row)
        shown = ", ".join(
            f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in found.items()
        )
        print(
            f"[{time.monotonic() - self.started:5.1f} s] {'ok    ' if ok else 'FAILED'} {name}: {shown}",
            flush=True,
        )

    def guarded(self, name: str, check: Callable[[], None]) -> None:
        """A check that breaks is one that failed; the others still run."""
        try:
            check()
        except Exception as error:
            self.tell(name, False, error=f"{type(error).__name__}: {error}"[:500])


def write_specs(folder: Path, names: Sequence[str]) -> Path:
    folder.mkdir()
    told = json.loads(CLIP.with_name("table.json").read_text(encoding="utf-8"))
    for i, name in enumerate(names):
        fields = {
            "video_path": str(CLIP),
            "prompt": told["prompt"],
            "edge": {},
            "num_steps": STEPS,
            "seed": i,
        }
        (folder / f"{name}.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def psnr(one: Path, other: Path) -> float:
    """dB between two clips."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    from cosmos_fast import video

    clips = []
    for path in (one, other):
        found = video.probe(path)
        with video.Source(found) as source:
            clips.append(source.read(0, found.frames).astype(np.float64))
    error = float(((clips[0] - clips[1]) ** 2).mean())
    return 10 * float(np.log10(255**2 / max(error, 1e-6)))


WAYS: dict[str, tuple[str, ...]] = {
    "a clip each": (), "guidance": ("--cfg", "2", "--context", "1"), "tokens": ("--cfg", "1", "--context", "2"),
}  # fmt: skip


def check_sharing(c: Check, run: Run, alone: Run, way: str) -> None:
    """Two GPUs against one: bytes, or where they share a clip the distance."""
    made, wanted = run.digests(), alone.digests()
    found: dict[str, Any] = {
        "exit": run.code,
        "clips": len(made),
        "same_bytes": made == wanted,
        "seconds": run.seconds,
    }
    ok = run.code == 0 and made.keys() == wanted.keys()
    if ok:
        found["exchange"] = json.loads((run.out / "run.json").read_text(encoding="utf-8"))["plan"]["exchange"]
        told = [line for line in run.lines if "exchange: " in line]  # on GPUs, and where tokens are shared
        expected = ("copies", "collectives") if way == "tokens" else ("none",)
        ok = found["exchange"] in expected and len(told) == (way == "tokens" and c.args.device == "cuda")
        found |= {"told": told} if told else {}
    if WAYS[way]:
        clips = [name for name in wanted if "_control_" not in name]
        found["psnr"] = (
            {name: round(psnr(run.out / name, alone.out / name), 1) for name in clips} if ok else {}
        )
        ok = ok and min(found["psnr"].values()) >= LEAST_PSNR
    else:
        ok = ok and made == wanted
    c.tell(way, ok, **found, **({} if ok else {"log": run.lines[-8:]}))


MESSAGES = {
    "raise": ("rank 1 (2 in all): RuntimeError: a fault made on purpose",),
    "memory": ("rank 1 (2 in all): out of GPU memory.",),
    "kill": ("rank 0 (2 in all) was killed by SIGKILL.",),
    "hang": ("rank 1 (2 in all) did nothing for ", "no step ended for "),  # until the first frames are there
}


def check_faults(c: Check, whats: Sequence[str]) -> None:
    """A clip for each fault, sound ones before, behind and after two: three lost in a row would end the run."""
    kinds = [SOUND, *whats[:2], SOUND, *whats[2:], SOUND] if len(whats) > 1 else [*whats, SOUND]
    names, title = [f"clip{i}_{kind}" for i, kind in enumerate(kinds)], "_".join(["faults", *whats])
    specs = write_specs(c.folder / f"specs_{title}", names)
    faults = [[i, 0 if what == "kill" else 1, what] for i, what in enumerate(whats)]
    run = c.generate(title, specs, "--gpus", "2", "--context", "2", "--cfg", "1", faults=faults)
    manifest = run.manifest()
    for name, what in zip(names, kinds, strict=True):
        if what == SOUND:
            continue
        line, happened, took = manifest.get(name, {}), c.folder / f"{what}.time", None
        if happened.exists() and "time" in line:  # which is told in whole seconds
            took = max(0.0, datetime.fromisoformat(line["time"]).timestamp() - float(happened.read_text()))
        told = [text for text in run.lines if f"{name}: failed: " in text]
        reason = str(line.get("reason"))
        ok = (
            line.get("status") == "failed"
            and reason.startswith(MESSAGES[what])
            and len(told) == 1
            and took is not None
            and took < SOON_S
        )
        c.tell(f"a rank's fault: {what}", ok, seconds=took, messages=len(told), reason=reason)
    done = [name for name, line in manifest.items() if line["status"] == "done"]
    left = [path.name for path in run.out.iterdir() if ".part" in path.name or path.name.endswith(".claim")]
    sound = [name for name in names if name.endswith(SOUND)]
    ok = sorted(done) == sound and run.code == 1 and not left
    ok = ok and all((run.out / f"{name}.mp4").exists() for name in done)
    c.tell(f"clips around: {', '.join(whats)}", ok, exit=run.code, done=done, left=left, seconds=run.seconds,
           **({} if ok else {"log": run.lines[-15:]}))  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["--command"]:
        command()
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a .json file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default="sharing,faults", help="sharing, faults")
    parser.add_argument(
        "--hang", action="store_true", help="also a rank that stops for good outside the steps"
    )
    parser.add_argument("--quick", action="store_true", help="faults alone, all of them at once")
    parser.add_argument("--deadline-s", type=float, default=150)
    parser.add_argument("--commit", help="of a copy without git, for the record")
    args = parser.parse_args()
    whats = ["raise", "memory", "kill", *(["hang"] if args.hang else [])]
    if args.quick:
        args.only = ""
    with tempfile.TemporaryDirectory(prefix="launcher-", ignore_cleanup_errors=True) as folder:
        c = Check(args, Path(folder))
        if "sharing" in args.only:
            specs = write_specs(c.folder / "specs", ["a", "b"])
            alone = c.generate("alone", specs)
            ok = alone.code == 0 and len(alone.digests()) == 4  # clips and their controls
            c.tell(
                "one GPU",
                ok,
                exit=alone.code,
                seconds=alone.seconds,
                **({} if ok else {"log": alone.lines[-8:]}),
            )
            # Side by side: each is mostly start-up, and what they share of the GPUs changes no value.
            with ThreadPoolExecutor(len(WAYS) if args.device == "cuda" else 1) as pool:
                runs = {way: pool.submit(c.generate, way.replace(" ", "_"), specs, "--gpus", "2", *options)
                        for way, options in WAYS.items()}  # fmt: skip
                for way, run in runs.items():
                    c.guarded(way, lambda: check_sharing(c, run.result(), alone, way))  # noqa: B023
        if args.quick:
            with ThreadPoolExecutor(len(whats) if args.device == "cuda" else 1) as pool:
                for what in whats:
                    pool.submit(c.guarded, what, partial(check_faults, c, [what]))
        if "faults" in args.only:
            c.guarded("faults", partial(check_faults, c, whats))
        record = {
            "kind": "launcher",
            "environment": environment(args.commit),
            "device": args.device,
            "seconds": time.monotonic() - c.started,
            "checks": c.rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record), flush=True)
    return int(not c.rows or not all(row["ok"] for row in c.rows))


if __name__ == "__main__":
    sys.exit(main())
