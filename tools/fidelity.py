"""What 8-bit recipes cost in fidelity, from one layer to the video, on the embedded model and held-out clips.

    python tools/fidelity.py OUT.json [--device cuda] [--clips 8] [--data FOLDER] [--recipes attention,linear,fp8]

Layers: at some steps of one clip, the error of self-attention's output for each way to make codes (nothing removed,
means removed, rotated, steps per head or per 128 tokens), on the activations that the model has. Calls: the error of a
velocity on the same input, prompts apart and guided. Clips: the same request and seed with the exact recipe and with
each other one, for every control and the few-step model: latent error, PSNR, SSIM, and what tools/evaluate_model.py
measures of both. Yardsticks: the exact recipe with another attention library (what rounding alone does), and with
another seed. Clips are rendered into FOLDER unless they lie there. With --deadline-s the clips done by then count. On a
CPU recipes run in fp32 but for what they quantise, and --recipes attention --clips 1 --steps 4 takes minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "train")]

import adherence_jobs as jobs  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from adherence import psnr, ssim  # noqa: E402
from evaluate_model import environment, mean  # noqa: E402
from fidelity_layers import Layers  # noqa: E402
from probe import WEIGHTS as PROBE  # noqa: E402
from torch import Tensor  # noqa: E402

from cosmos_fast.dispatch import use, used  # noqa: E402
from cosmos_fast.engine import Engine  # noqa: E402
from cosmos_fast.formats import CONTROLS, DISTILLED  # noqa: E402
from cosmos_fast.network import Pair, Single  # noqa: E402
from cosmos_fast.recipe import Plan, Recipe  # noqa: E402

RECIPES: dict[str, dict[str, Any]] = {
    "attention": {"attention": "fp8"},
    "linear": {"linear": "fp8"},
    "fp8": {"attention": "fp8", "linear": "fp8"},
    "scheduled": {"attention": "fp8", "linear": "fp8", "attention_head": 0.2, "attention_tail": 0.1},
}
GOALS = {"psnr_db": 35.0, "metric_change": 0.02}
"""Mean PSNR against exact, at least; change of the mean of each measure of control, at most."""

SHARES = (0.0, 0.3, 0.6, 0.97)
"""Where in the schedule layers and calls are looked at."""


# --- engines ---------------------------------------------------------------------------------------


def recipe_of(name: str) -> Recipe:
    """exact, or one of RECIPES. On a CPU in fp32, but for recipes that need bf16."""
    changes = RECIPES.get(name, {})
    on_gpu = jobs._where is not None and jobs._where.device.startswith("cuda")
    dtype = "bf16" if on_gpu or "linear" in changes else "fp32"
    return Recipe(name=name, dtype=dtype, **changes)


class Kept(Engine):
    """Keeps the latents of the last chunk it made."""

    latents: Tensor

    def _sample(self, *args: Any, **kwargs: Any) -> Tensor:
        self.latents = super()._sample(*args, **kwargs)
        return self.latents


class Watched(Engine):
    """Exact, and at some steps lets other networks see what it sees."""

    layers: Layers
    others: Mapping[str, Any]
    calls: dict[str, dict[str, list[float]]]
    guidance = 0.0

    def _attention(self) -> Any:
        return self.layers

    def _graphed(self, bound: Pair | Single) -> Any:
        context = bound.cond if isinstance(bound, Pair) else bound.ctx
        steps = context.tables.head.shape[0]
        watched = {round(share * (steps - 1)) for share in SHARES}
        modules = dict(self.network.named_modules())
        self.layers.names = {m.q_gain.data_ptr(): n for n, m in modules.items() if hasattr(m, "attend")}

        def call(z: Tensor, step: int) -> Any:
            self.layers.active = step in watched
            v = bound(z, step)
            self.layers.active = False
            for name, network in self.others.items() if step in watched else ():
                self._compare(name, v, replace(bound, network=network)(z, step))
            return v

        return call

    def _compare(self, name: str, true: Any, got: Any) -> None:
        table = self.calls.setdefault(name, {})
        pairs = {"velocity": (true, got)}
        if isinstance(true, tuple):
            pairs = {"velocity": (true[0], got[0])}
            if true[1] is not None:
                guided = [c + self.guidance * (c - u) for c, u in (true, got)]
                pairs |= {"without prompt": (true[1], got[1]), "guided": (guided[0], guided[1])}
        for key, (a, b) in pairs.items():
            table.setdefault(key, []).append(float((a.float() - b.float()).norm() / a.float().norm()))


@cache
def engine(model: str, recipe: str) -> Kept:
    where = jobs._where
    assert where is not None
    return Kept(model=model, recipe=recipe_of(recipe), plan=Plan(device=where.device, graphs=where.graphs))


def look(model: str, names: Sequence[str], steps: int | None) -> dict[str, Any]:
    """Layers and calls of the first clip."""
    where = jobs._where
    assert where is not None
    engines = {name: engine(model, name) for name in names}
    Watched.layers = Layers(engine(model, "attention")._attention())
    # One that computes in the dtype of the exact one beside it: on a CPU those with 8-bit linears do not.
    Watched.others = {n: e.network for n, e in engines.items() if e.dtype == recipe_dtype()}
    Watched.calls = {}
    watched = Watched(model=model, recipe=recipe_of("exact"), plan=Plan(device=where.device))
    spec = jobs.spec_of(jobs.Job(model, 0, {"edge": 1.0}, (0,), (), "look", steps=steps))
    Watched.guidance = spec.guidance
    watched.generate(spec)
    calls = {name: {key: mean(values) for key, values in rows.items()} for name, rows in Watched.calls.items()}  # fmt: skip
    return {"layers": Watched.layers.summary(), "calls": calls}


def recipe_dtype() -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[recipe_of("exact").dtype]


# --- clips -----------------------------------------------------------------------------------------


def run(job: jobs.Job, names: Sequence[str], other_library: str | None) -> dict[str, Any]:
    """One request with the exact recipe and with the others: differences, and what is measured of each."""
    where = jobs._where
    assert where is not None
    spec, truth = jobs.spec_of(job), jobs.held(where.data, job.clip)
    made: dict[str, tuple[np.ndarray, Tensor]] = {}

    def make(name: str, recipe: str, request: Any = spec) -> None:
        one = engine(job.model, recipe)
        made[name] = (one.generate(request).frames, one.latents)

    make("exact", "exact")
    for name in names:
        make(name, name)
    if other_library:
        with use(attention=other_library):
            make("other library", "exact")
    make("other seed", "exact", spec.model_copy(update={"seed": spec.seed + 1000}))
    frames, latents = made["exact"]
    rows = {}
    for name, (other, z) in made.items():
        row: dict[str, Any] = {"measures": jobs.measured(other, truth, job.measures)}
        if name != "exact":
            by_frame = [psnr(a, b) for a, b in zip(other, frames, strict=True)]
            row |= {"psnr_db": psnr(other, frames), "worst_frame_db": min(by_frame), "ssim": ssim(other, frames),
                    "latent": float((z - latents).norm() / latents.norm())}  # fmt: skip
        rows[name] = row
    return {"clip": job.clip, "tag": job.tag, "rows": rows, "used": used()}


def jobs_of(clips: int, models: Sequence[str], steps: int | None) -> list[list[jobs.Job]]:
    """The jobs of each clip."""
    every = []
    for k in range(clips):
        mine = [
            jobs.Job(c, k, {c: 1.0}, (k,), (jobs.MEASURES[c],), c, steps=steps)
            for c in CONTROLS
            if c in models  # fmt: skip
        ]
        if DISTILLED in models:
            mine.append(jobs.Job(DISTILLED, k, {"edge": 1.0}, (k,), ("edge_f1",), "edge_distilled"))
        every.append(mine)
    return every


def summary(done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By recipe: PSNR and so on over all clips, its worst, by kind of request; each measure beside the exact one's."""
    names = list(dict.fromkeys(name for d in done for name in d["rows"] if name != "exact"))
    table = {}
    for name in names:
        rows = [(d["tag"], d["rows"][name], d["rows"]["exact"]) for d in done if name in d["rows"]]
        one: dict[str, Any] = {key: mean([row[key] for _, row, _ in rows]) for key in ("psnr_db", "ssim", "latent")}  # fmt: skip
        one |= {"worst_clip_db": min(row["psnr_db"] for _, row, _ in rows),
                "worst_frame_db": min(row["worst_frame_db"] for _, row, _ in rows)}  # fmt: skip
        one["by_request"], one["measures"] = {}, {}
        for tag in dict.fromkeys(tag for tag, *_ in rows):
            of_tag = [(row, base) for t, row, base in rows if t == tag]
            one["by_request"][tag] = {"psnr_db": mean([row["psnr_db"] for row, _ in of_tag])}
            for measure in of_tag[0][0]["measures"]:
                value, base = (mean([r["measures"][measure] for r in side]) for side in zip(*of_tag, strict=True))  # fmt: skip
                one["measures"][tag] = {"measure": measure, "value": value, "exact": base,
                                        "change": (value - base) / max(abs(base), 1e-9)}  # fmt: skip
        table[name] = one
    return table


def goals(found: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        if name in found:
            worst = max((abs(m["change"]) for m in found[name]["measures"].values()), default=0.0)
            for key, rule, value in (
                ("psnr_db", ">=", found[name]["psnr_db"]),
                ("metric_change", "<=", worst),
            ):
                passed = value >= GOALS[key] if rule == ">=" else value <= GOALS[key]
                rows.append({"metric": f"{key}.{name}", "rule": rule, "goal": GOALS[key], "value": value, "passed": bool(passed)})  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--recipes", default="attention,linear,fp8", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--models", default=",".join((*CONTROLS, DISTILLED)))
    parser.add_argument("--steps", type=int, help="steps of the base models; default: the model's own")
    parser.add_argument(
        "--data", type=Path, help="folder of rendered held-out clips; filled where it lacks some"
    )
    parser.add_argument("--workers", type=int, help="processes; default: 4 on a GPU, 1 on a CPU")
    parser.add_argument("--other-library", help="attention library of the yardstick; default: cudnn on a GPU")
    parser.add_argument("--deadline-s", type=float, default=1e9)
    args = parser.parse_args(argv)
    names, models = args.recipes.split(","), args.models.split(",")
    for given, known in ((names, RECIPES), (models, (*CONTROLS, DISTILLED))):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"must be of {', '.join(known)}, got {', '.join(unknown)}.")
    is_gpu = args.device.startswith("cuda")
    end = time.monotonic() + args.deadline_s
    with tempfile.TemporaryDirectory() as scratch:
        data, media = args.data or Path(scratch) / "data", Path(scratch) / "media"
        media.mkdir()
        jobs.prepare(data, args.clips)
        for k in range(args.clips):
            jobs.write_files(data, media, k)
        where = jobs.Where(data, media, args.device, is_gpu, {"folder": None, "probe": PROBE})
        other = args.other_library or ("cudnn" if is_gpu else None)
        record: dict[str, Any] = {
            "kind": "fidelity",
            "environment": environment(args.device),
            "steps": args.steps,
        }
        done = measure(where, jobs_of(args.clips, models, args.steps), names, other, args, end, record)
    kept = {d["clip"] for d in done}
    record |= {"clips": len(kept), "fidelity": summary(done), "used": done[0]["used"] if done else {}}
    record |= {"goals": goals(record["fidelity"], names), "per_clip": done}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for name, row in record["fidelity"].items():
        print(f"{name:14s} PSNR {row['psnr_db']:5.1f} dB, worst clip {row['worst_clip_db']:5.1f}, SSIM {row['ssim']:.4f}, latent {row['latent']:.2e}")  # fmt: skip
    for goal in record["goals"]:
        print(f"{'pass' if goal['passed'] else 'FAIL'}  {goal['metric']:<26} {goal['value']:8.4f}  goal {goal['rule']} {goal['goal']}")  # fmt: skip
    print(f"{args.out}: {len(kept)} clips")
    return 0


def measure(
    where: jobs.Where, todo: list[list[jobs.Job]], names: list[str], other: str | None, args: argparse.Namespace,
    end: float, record: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """The results of the clips that are whole by the deadline; `record` gets layers and calls."""
    workers = args.workers or (4 if where.device.startswith("cuda") else 1)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), jobs.start, (where,))
    first = todo[0][0].model if todo and todo[0] else "edge"
    looks = pool.submit(look, first, names, args.steps)
    futures = [[pool.submit(run, job, names, other) for job in clip] for clip in todo]
    done: list[dict[str, Any]] = []
    told: Callable[[str], None] = lambda text: print(text, flush=True)  # noqa: E731
    for k, clip in enumerate(futures):
        finished, late = wait(clip, max(end - time.monotonic(), 0))
        if late:
            told(f"deadline: {k} of {len(todo)} clips are whole")
            break
        done += [future.result() for future in clip]
        told(f"clip {k}: " + ", ".join(f"{n} {mean([d['rows'][n]['psnr_db'] for d in done if d['clip'] == k]):.1f} dB" for n in names))  # fmt: skip
    if looks.done() or time.monotonic() < end:
        record |= {"model": first, **looks.result()}
        for way, row in record["layers"].items():
            told(
                f"layer error, {way:26s} mean {row['mean']:.2e}, worst {row['worst']:.2e} at {row['worst_layer']}"
            )
        for name, row in record["calls"].items():
            told(f"call error, {name}: " + ", ".join(f"{key} {value:.2e}" for key, value in row.items()))
    for future in (f for clip in futures for f in clip):
        future.cancel()
    stop(pool)
    return done


def stop(pool: ProcessPoolExecutor) -> None:
    """End the workers, whatever they are at: past the deadline nobody waits for them."""
    for process in list(pool._processes.values()):
        process.terminate()
    pool.shutdown(wait=True, cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main())
