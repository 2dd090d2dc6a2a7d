"""Render a data set of clips into shards.

    python tools/data/make_dataset.py OUT --clips 6000 --seed 0 --workers 16

Shard k holds the clips of 64 successive indices: OUT/shard_00000.npz with rgb (N, F, H, W, 3), depth and labels
(N, F, H, W), all uint8, and OUT/shard_00000.jsonl with a line per clip: caption, index, seed, main, labels,
background and what was drawn. Shards that are complete are kept, so an interrupted run is continued by the same
command; settings that differ from those in OUT/dataset.json are refused.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402

from cosmos_fast.formats import CosmosFastError, EnvironmentProblem, SpecError  # noqa: E402
from tools.data.render import render_clip  # noqa: E402
from tools.data.scenes import HELD_OUT  # noqa: E402

SHARD = 64


def shard_path(out: Path, k: int) -> Path:
    return out / f"shard_{k:05d}.npz"


def write_shard(
    out: Path, k: int, first: int, clips: int, seed: int, frames: int, size: tuple[int, int]
) -> int:
    """Render `clips` clips from index `first` on and publish them as shard k. Returns how many frames there are."""
    made = [render_clip(first + i, seed, frames, size) for i in range(clips)]
    arrays = {
        "rgb": np.stack([clip.rgb for clip in made]),
        "depth": np.stack([clip.depth8 for clip in made]),
        "labels": np.stack([clip.labels for clip in made]),
    }
    told = "".join(json.dumps({"caption": clip.caption, **clip.attributes}) + "\n" for clip in made)
    path = shard_path(out, k)
    part = path.with_suffix(".part")
    _save(part, arrays)
    path.with_suffix(".jsonl").write_text(told, encoding="utf-8")
    # The array file comes last: where it exists the shard is complete.
    os.replace(part, path)
    return clips * frames


def _save(path: Path, arrays: dict[str, npt.NDArray[np.uint8]]) -> None:
    """An .npz whose labels alone are deflated: they shrink a hundredfold, pictures hardly and slowly."""
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            # A fixed date keeps the bytes of a shard a function of its settings.
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED if name == "labels" else zipfile.ZIP_STORED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def read_shards(out: Path) -> Iterator[tuple[dict[str, npt.NDArray[np.uint8]], list[dict[str, Any]]]]:
    """Arrays and records of each complete shard, in order.

    Raises:
        SpecError: the folder has no shard.
    """
    paths = sorted(out.glob("shard_*.npz"))
    if not paths:
        raise SpecError(f"{out}: must hold a shard, got none. Make them with tools/data/make_dataset.py.")
    for path in paths:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("rgb", "depth", "labels")}
        told = path.with_suffix(".jsonl").read_text(encoding="utf-8")
        yield arrays, [json.loads(line) for line in told.splitlines()]


def _agree(out: Path, settings: dict[str, Any]) -> None:
    """Keep one data set per folder."""
    file = out / "dataset.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != settings:
            raise SpecError(
                f"{out}: settings must be those of its shards, {found}, got {settings}. Use a new folder."
            )
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(
            f"{out}: must be a folder to write to, got {error}. Choose another."
        ) from error


def make(
    out: Path, clips: int, seed: int, workers: int, size: tuple[int, int], frames: int, first: int = 0
) -> None:
    """Write all shards that `out` lacks, with `workers` processes."""
    if clips < 1 or workers < 1 or first < 0:
        raise SpecError(
            f"clips, workers, first: must be 1, 1, 0 or more, got {clips}, {workers}, {first}. Raise them."
        )
    if first < HELD_OUT < first + clips:
        raise SpecError(
            f"clips: must stay on one side of index {HELD_OUT}, got {first}..{first + clips - 1}. Make two sets."
        )
    # clips may grow from run to run; a last shard that is not full is made again under its larger size.
    _agree(out, dict(seed=seed, frames=frames, size=list(size), first=first, shard=SHARD))
    todo = []
    for k, start in enumerate(range(0, clips, SHARD)):
        count = min(SHARD, clips - start)
        if not _complete(out, k, count):
            todo.append((k, first + start, count))
    total, done, began = sum(count for _, _, count in todo), 0, time.perf_counter()
    print(f"{clips - total} of {clips} clips are there, {total} to render", file=sys.stderr)
    if not todo:
        return
    # Spawned, because a GL context does not survive a fork.
    pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=multiprocessing.get_context("spawn"))
    with pool:
        jobs = [
            pool.submit(write_shard, out, k, start, count, seed, frames, size) for k, start, count in todo
        ]
        try:
            for job in as_completed(jobs):
                done += job.result()
                spent = time.perf_counter() - began
                clips_done = done // frames
                print(
                    f"{clips_done}/{total} clips, {done / spent:.1f} frames/s, {60 * clips_done / spent:.0f} clips/min",
                    file=sys.stderr,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _complete(out: Path, k: int, count: int) -> bool:
    path = shard_path(out, k)
    lines = path.with_suffix(".jsonl")
    return path.exists() and lines.exists() and len(lines.read_text(encoding="utf-8").splitlines()) >= count


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, got {text!r}") from None
    return width, height


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Render a data set of clips into shards.")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the shards")
    parser.add_argument("--clips", type=int, required=True, help="how many clips the set has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first", type=int, default=0, help=f"first index; held-out clips start at {HELD_OUT}"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    parser.add_argument("--size", type=_size, default=(320, 192), help="WIDTHxHEIGHT (default: 320x192)")
    parser.add_argument("--frames", type=int, default=17, help="4k+1 (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        make(
            options.out,
            options.clips,
            options.seed,
            options.workers,
            options.size,
            options.frames,
            options.first,
        )
    except SpecError as error:
        print(f"make_dataset: {error}", file=sys.stderr)
        return 2
    except CosmosFastError as error:
        print(f"make_dataset: {error}", file=sys.stderr)
        return 3
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
