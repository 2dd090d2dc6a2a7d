"""Ranks of one host that read a clip together: once for all of them, against each for itself, in turns in one run.

    python tools/bench_reading.py --out bench/results                 1, 2, 4 and 8 processes, 93 frames at 720p with edges
    python tools/bench_reading.py --out F.json --ranks 2 --rounds 3
    python tools/bench_reading.py --out /tmp/f.json --smoke           a few small frames: checks this script

Processes on the CPU, without a model: each takes the control as an encode takes it, window by window, the rows of its strip.
Counted is the time until the last process has the last window, after one round of each way that is not counted.
"""

from __future__ import annotations

import argparse
import os
import queue
import sys
import tempfile
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools"), str(ROOT)]

import scaling_clip  # noqa: E402
from records import destination, environment  # noqa: E402
from scaling_ranks import free_port, identity, write  # noqa: E402

from cosmos_fast import neighbours  # noqa: E402
from cosmos_fast.inputs import ClipInputs  # noqa: E402
from cosmos_fast.parallel import Mesh  # noqa: E402
from cosmos_fast.planning import preflight  # noqa: E402
from cosmos_fast.reading import Reader  # noqa: E402
from cosmos_fast.recipe import Plan  # noqa: E402
from cosmos_fast.spec import Spec  # noqa: E402
from cosmos_fast.stages import Stages  # noqa: E402
from cosmos_fast.vae import windows  # noqa: E402

WINDOW = Plan().vae_encode_window
LIMIT_S = 120.0


def rank(number: int, size: int, port: int, clip: Path, smoke: bool, rounds: int, results: Any) -> None:
    """One process: rounds in which it reads for itself, and in which the first reads for all."""
    os.environ |= identity(number, size, port)
    mesh = Mesh.open(Plan(device="cpu", context=size), timeout_s=LIMIT_S)
    length = scaling_clip.SMOKE_FRAMES if smoke else scaling_clip.FRAMES
    asked = Spec(
        name="clip", prompt="A street.", video_path=clip, edge={}, num_video_frames_per_chunk=length,
        resolution="256" if smoke else "720",
    )  # fmt: skip
    plan = preflight([asked], "edge", chunk_lengths=(length, 1)).clips[0]
    rows = plan.model_size[1] // size
    mine = slice(number * rows, (number + 1) * rows)
    ways = {"own": neighbours.Neighbours(mesh.world), "shared": neighbours.meet(mesh.world)}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way in ways if turn % 2 else reversed(ways):
            near, stages = ways[way], Stages(mesh.device)
            mesh.world.hear(None)
            start, cpu = time.perf_counter(), time.process_time()
            with Reader(partial(ClipInputs, plan, rooms=near.rooms), plan.chunks, stages, near) as reader:
                for one in reader:
                    bounds = windows(length, WINDOW * size)
                    for first, stop in bounds:
                        one.control("edge", first, stop)[:, mine].copy()
                        if (first, stop) == bounds[0]:
                            first_s = time.perf_counter() - start
                    last_s = time.perf_counter() - start
            every = mesh.world.hear((first_s, last_s, time.process_time() - cpu))
            if turn:
                found[way].append({
                    "first_window_s": max(row[0] for row in every), "seconds": max(row[1] for row in every),
                    "cpu_s": sum(row[2] for row in every),
                })  # fmt: skip
    mesh.close()
    if number == 0:
        results.put(found)


def measure(size: int, clip: Path, smoke: bool, rounds: int) -> dict[str, Any]:
    """Both ways by so many processes: medians, and every round."""
    context = get_context("spawn")
    results, port = context.Queue(), free_port()
    processes = [
        context.Process(target=rank, args=(number, size, port, clip, smoke, rounds, results))
        for number in range(size)
    ]
    for process in processes:
        process.start()
    found, until = None, time.monotonic() + LIMIT_S
    try:
        while found is None:
            try:
                found = results.get(timeout=1)
            except queue.Empty:
                if time.monotonic() > until or any(process.exitcode for process in processes):
                    raise SystemExit(
                        f"bench_reading: {size} ranks: one failed, or took over {LIMIT_S:.0f} s"
                    ) from None
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return {
        way: {key: median(row[key] for row in rows) for key in rows[0]} | {"rounds": rows}
        for way, rows in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a .json file, or the folder bench/results")
    parser.add_argument("--ranks", default="1,2,4,8", help="numbers of processes, comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="a small clip: checks this script")
    args = parser.parse_args()
    record: dict[str, Any] = {
        "kind": "reading", "environment": environment(args.commit) | {"cores": os.cpu_count()},
        "args": {key: str(value) for key, value in vars(args).items() if key != "out"}, "ranks": {},
    }  # fmt: skip
    out = destination(args.out, record["environment"], "reading")
    with tempfile.TemporaryDirectory(prefix="reading-") as folder:
        clip = Path(folder) / scaling_clip.CLIP
        scaling_clip.write_clip(clip, smoke=args.smoke)
        for size in map(int, args.ranks.split(",")):
            row = record["ranks"][str(size)] = measure(size, clip, args.smoke, args.rounds)
            write(out, record)
            told = ", ".join(
                f"{way} {of['seconds']:.3f} s ({of['cpu_s']:.2f} s of cores)" for way, of in row.items()
            )
            print(f"{size} ranks: {told}", flush=True)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
