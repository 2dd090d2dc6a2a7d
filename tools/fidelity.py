"""What 8-bit recipes cost in fidelity, from one layer to the video, on the embedded model and held-out clips.

    python tools/fidelity.py OUT [--device cuda] [--clips 8] [--data FOLDER] [--recipes attention,linear,fp8,scheduled,te]

Layers: at some steps of one clip, the error of self-attention's output for each way to make codes (nothing removed,
means removed, rotated, steps per head or per 128 tokens), and of every linear layer's product, on the activations that the
model has. Calls: the error of a velocity on the same input, by recipe and with one kind of linear layer in 8 bits at a time,
those that the rule leaves in full precision too. Clips: the same request and seed with the exact recipe and with
each other one, for every control and the few-step model: latent error, PSNR, SSIM, and what tools/evaluate_model.py
measures of both. Yardsticks: the exact recipe with another attention library (what rounding alone does), and with
another seed. Clips are rendered into FOLDER unless they lie there. With --deadline-s the clips done by then count; what
fails is recorded and the rest goes on, but a recipe that failed for any request, or ran on other implementations for some,
gets no figures and meets no goal. OUT: a .json file, or the folder bench/results. On a CPU recipes run in fp32 but for
what they quantise, and --recipes attention --clips 1 --steps 4 takes minutes; --clips 0 looks at layers and calls alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from statistics import stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "train"), str(ROOT / "bench")]

import adherence_jobs as jobs  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from adherence import psnr, ssim  # noqa: E402
from evaluate_model import environment, mean  # noqa: E402
from fidelity_engines import RECIPES, engine, look  # noqa: E402
from probe import WEIGHTS as PROBE  # noqa: E402
from records import destination  # noqa: E402
from torch import Tensor  # noqa: E402

from cosmos_fast.dispatch import TABLE, use, used  # noqa: E402
from cosmos_fast.formats import CONTROLS, DISTILLED  # noqa: E402

GOALS = {"psnr_db": 35.0, "metric_change": 0.02}
"""Mean PSNR against exact, at least; change of the mean of each measure of control, at most. The few-step model apart."""
STEADY = ("attention", "attention_fp8", "linear_fp8", "linear_gelu_fp8")
"""Ops whose implementation a figure is of: one and the same for all clips."""

# --- clips -----------------------------------------------------------------------------------------


def run(job: jobs.Job, names: Sequence[str], other_library: str | None) -> dict[str, Any]:
    """One request with the exact recipe and with the others: differences, and what is measured of each."""
    where = jobs._where
    assert where is not None
    spec, truth = jobs.spec_of(job), jobs.held(where.data, job.clip)
    started, failed = time.monotonic(), {}

    def make(name: str, recipe: str, request: Any = spec, **library: str) -> tuple[np.ndarray, Tensor] | None:
        try:
            with use(**library) if library else nullcontext():
                one = engine(job.model, recipe)
                return one.generate(request).frames, one.latents
        except Exception as error:  # one recipe that cannot run here must not take the others with it
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            return None

    one = engine(job.model, "exact")
    frames, latents = one.generate(spec).frames, one.latents
    made = {name: make(name, name) for name in names}
    implementations = used()  # before another library is forced, which begins them anew
    others = {op: why for op in STEADY for why in TABLE[op].reasons.values() if why}
    if other_library:
        made["other library"] = make("other library", "exact", attention=other_library)
    made["other seed"] = make("other seed", "exact", spec.model_copy(update={"seed": spec.seed + 1000}))
    rows: dict[str, dict[str, Any]] = {"exact": {"measures": jobs.measured(frames, truth, job.measures)}}
    for name, found in made.items():
        if found is not None:
            other, z = found
            by_frame = [psnr(a, b) for a, b in zip(other, frames, strict=True)]
            rows[name] = {
                "measures": jobs.measured(other, truth, job.measures), "psnr_db": psnr(other, frames),
                "worst_frame_db": min(by_frame), "ssim": ssim(other, frames),
                "latent": float((z - latents).norm() / latents.norm()),
            }  # fmt: skip
    return {"clip": job.clip, "tag": job.tag, "rows": rows, "failed": failed, "used": implementations, "others": others,
            "seconds": time.monotonic() - started}  # fmt: skip


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


def ran(done: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Of each op every implementation that some request ran."""
    ops = sorted({op for d in done for op in d["used"]})
    return {op: sorted({name for d in done for name in d["used"].get(op, ())}) for op in ops}


def withheld(done: Sequence[Mapping[str, Any]], lost: Mapping[str, str]) -> dict[str, str]:
    """Recipes and yardsticks that get no figures, and why: of some requests alone they would be of other clips than said.

    lost: requests of which nothing came, and what they said.
    """
    ways = {op: {"+".join(d["used"][op]) for d in done if op in d["used"]} for op in STEADY}
    mixed = [f"{op} ran as {' and as '.join(sorted(one))}" for op, one in ways.items() if len(one) > 1]
    found = {}
    for name in dict.fromkeys(n for d in done for n in (*d["rows"], *d["failed"]) if n != "exact"):
        said = [*lost.values(), *(d["failed"][name] for d in done if name in d["failed"])]
        if said:
            found[name] = f"{len(said)} of {len(done) + len(lost)} requests failed, the first with {said[0]}"
        elif mixed:
            found[name] = "; ".join(mixed)
    return found


def summary(done: Sequence[Mapping[str, Any]], without: Mapping[str, str]) -> dict[str, Any]:
    """By recipe: PSNR and so on over all clips, its worst, by kind of request; each measure beside the exact one's."""
    names = list(dict.fromkeys(name for d in done for name in d["rows"] if name != "exact"))
    table = {}
    for name in (name for name in names if name not in without):
        rows = [(d["tag"], d["rows"][name], d["rows"]["exact"]) for d in done]
        one: dict[str, Any] = {key: mean([row[key] for _, row, _ in rows]) for key in ("psnr_db", "ssim", "latent")}  # fmt: skip
        one |= {"worst_clip_db": min(row["psnr_db"] for _, row, _ in rows),
                "worst_frame_db": min(row["worst_frame_db"] for _, row, _ in rows)}  # fmt: skip
        one["by_request"], one["measures"] = {}, {}
        for tag in dict.fromkeys(tag for tag, *_ in rows):
            of_tag = [(row, base) for t, row, base in rows if t == tag]
            one["by_request"][tag] = {"psnr_db": mean([row["psnr_db"] for row, _ in of_tag])}
            for measure in of_tag[0][0]["measures"]:
                pairs = [(row["measures"][measure], base["measures"][measure]) for row, base in of_tag]
                one["measures"][tag] = {"measure": measure} | changed(pairs)
        table[name] = one
    return table


def changed(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Of a measure of the same clips by a recipe and by exact: both means, the relative change of the mean, its error.

    error: the standard error of the change, from how clips differ in it; None for one clip, which cannot tell.
    """
    value, base = (mean(side) for side in zip(*pairs, strict=True))
    whole = max(abs(base), 1e-9)
    spread = stdev(a - b for a, b in pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else None
    return {"value": value, "exact": base, "change": (value - base) / whole,
            "error": None if spread is None else spread / whole, "clips": len(pairs)}  # fmt: skip


def goals(
    found: Mapping[str, Any], names: Sequence[str], without: Mapping[str, str], tags: Sequence[str]
) -> list[dict[str, Any]]:
    """Each goal of each recipe, met or not: of the base models, and of the few-step one by itself.

    tags: kinds of request that were made. A recipe without figures meets none.
    """
    rows = []
    ends = {"": [t for t in tags if not t.endswith("distilled")], ".distilled": [t for t in tags if t.endswith("distilled")]}  # fmt: skip
    for name in names:
        for end, of_end in ends.items():
            mine = [tag for tag in of_end if tag in found.get(name, {}).get("by_request", ())]
            if not mine and not (of_end and name in without):
                continue
            for key, rule in (("psnr_db", ">="), ("metric_change", "<=")):
                row = {"metric": f"{key}.{name}{end}", "rule": rule, "goal": GOALS[key]}
                if name in without:
                    rows.append(row | {"value": None, "passed": False, "why": without[name]})
                elif key == "psnr_db":
                    value = mean([found[name]["by_request"][tag]["psnr_db"] for tag in mine])
                    rows.append(row | {"value": value, "passed": bool(value >= GOALS[key])})
                else:
                    tag = max(mine, key=lambda tag: abs(found[name]["measures"][tag]["change"]))
                    most = found[name]["measures"][tag]
                    rows.append(row | {"value": abs(most["change"]), "passed": bool(abs(most["change"]) <= GOALS[key]),
                                       "of": tag, "error": most["error"], "clips": most["clips"]})  # fmt: skip
    return rows


# --- processes -------------------------------------------------------------------------------------


class Pools:
    """Processes of one worker each. A model's clips go to the same few, so that it is loaded and compiled there alone."""

    def __init__(self, where: jobs.Where, workers: int, models: Sequence[str]) -> None:
        context = get_context("spawn")
        self.models = list(models)
        self.pools = [ProcessPoolExecutor(1, context, jobs.start, (where,)) for _ in range(workers)]

    def submit(self, model: str, clip: int, *task: Any) -> Future[Any]:
        return self.pools[place(self.models.index(model), clip, len(self.models), len(self.pools))].submit(
            *task
        )

    def stop(self) -> None:
        """End the workers, whatever they are at: past the deadline nobody waits for them."""
        for pool in self.pools:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)


def place(model: int, clip: int, models: int, workers: int) -> int:
    """Which of the workers makes a clip: with more workers than models, those left over share a model's clips."""
    own = [w for w in range(workers) if w % models == model] or [model % workers]
    return own[clip % len(own)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument(
        "--recipes", default="attention,linear,fp8,scheduled", help=f"of {', '.join(RECIPES)}"
    )
    parser.add_argument("--models", default=",".join((*CONTROLS, DISTILLED)))
    parser.add_argument("--steps", type=int, help="steps of the base models; default: the model's own")
    parser.add_argument(
        "--data", type=Path, help="folder of rendered held-out clips; filled where it lacks some"
    )
    parser.add_argument("--workers", type=int, help="processes; default: 10 on a GPU, 1 on a CPU")
    parser.add_argument("--other-library", help="attention library of the yardstick; default: cudnn on a GPU")
    parser.add_argument("--deadline-s", type=float, default=1e9)
    args = parser.parse_args(argv)
    names, models = args.recipes.split(","), args.models.split(",")
    for given, known in ((names, RECIPES), (models, (*CONTROLS, DISTILLED))):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"must be of {', '.join(known)}, got {', '.join(unknown)}.")
    is_gpu = args.device.startswith("cuda")
    end = time.monotonic() + args.deadline_s
    about = environment(args.device)
    out = destination(args.out, about, "fidelity")
    with tempfile.TemporaryDirectory() as scratch:
        data, media = args.data or Path(scratch) / "data", Path(scratch) / "media"
        media.mkdir()
        jobs.prepare(data, max(args.clips, 1))
        for k in range(max(args.clips, 1)):
            jobs.write_files(data, media, k)
        where = jobs.Where(data, media, args.device, is_gpu, {"folder": None, "probe": PROBE})
        record: dict[str, Any] = {"kind": "fidelity", "environment": about, "steps": args.steps, "model": models[0], "failures": {}}  # fmt: skip
        pools = Pools(where, args.workers or (10 if is_gpu else 1), models)
        try:
            measure(pools, jobs_of(args.clips, models, args.steps), names, args, end, record, out)
        finally:
            pools.stop()
    print(verdict(record))
    print(f"{out}: {record['clips']} clips, {len(record['failures'])} failures")
    return int(bool(record["failures"]))


def measure(
    pools: Pools, todo: list[list[jobs.Job]], names: list[str], args: argparse.Namespace, end: float,
    record: dict[str, Any], out: Path,
) -> None:  # fmt: skip
    """Fill the record, and write it whenever a clip is whole: layers and calls first, then the clips done by the deadline."""
    other = args.other_library or ("cudnn" if args.device.startswith("cuda") else None)
    looks = pools.submit(record["model"], 0, look, record["model"], names, args.steps)
    futures = [[pools.submit(job.model, job.clip, run, job, names, other) for job in clip] for clip in todo]
    done: list[dict[str, Any]] = []
    lost: dict[str, str] = {}
    tags = list(dict.fromkeys(job.tag for clip in todo for job in clip))
    record |= {"clips": 0, "fidelity": {}, "withheld": {}, "goals": [], "used": {}, "per_clip": done}
    if result(looks, "look", end, record):
        record |= looks.result()
        tell_look(record)
    for k, clip in enumerate(futures):
        for job, future in zip(todo[k], clip, strict=True):
            what = f"clip {k} {job.tag}"
            if result(future, what, end, record):
                done.append(future.result())
                record["failures"] |= {f"{what} {n}": why for n, why in done[-1]["failed"].items()}
            elif what in record["failures"]:
                lost[what] = record["failures"][what]
        without = withheld(done, lost)
        record |= {"clips": len({d["clip"] for d in done}), "withheld": without, "fidelity": summary(done, without), "used": ran(done)}  # fmt: skip
        record["goals"] = goals(record["fidelity"], names, without, tags)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        told = {
            n: [d["rows"][n]["psnr_db"] for d in done if d["clip"] == k and n in d["rows"]] for n in names
        }
        print(
            f"clip {k}: " + ", ".join(f"{n} {mean(v):.1f} dB" if v else f"{n} none" for n, v in told.items()),
            flush=True,
        )
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def result(future: Future[Any], what: str, end: float, record: dict[str, Any]) -> bool:
    """Whether it came in time and whole; what it said otherwise is a failure, a clip too late is not."""
    wait([future], max(end - time.monotonic(), 0))
    if not future.done():
        record.setdefault("late", []).append(what)
        return False
    if (error := future.exception()) is not None:
        record["failures"][what] = f"{type(error).__name__}: {str(error)[:500]}"
        print(f"FAILED {what}: {record['failures'][what]}", flush=True)
        return False
    return True


def tell_look(record: Mapping[str, Any]) -> None:
    for what in ("layers", "products"):
        for way, row in record[what].items():
            print(
                f"{what}, {way:26s} mean {row['mean']:.2e}, worst {row['worst']:.2e} at {row['worst_layer']}"
            )
    for name, row in record["calls"].items():
        print(
            f"call error, {name:30s} " + ", ".join(f"{key} {value:.2e}" for key, value in row.items()),
            flush=True,
        )


def verdict(record: Mapping[str, Any]) -> str:
    lines = [
        f"{name:14s} PSNR {row['psnr_db']:5.1f} dB, worst clip {row['worst_clip_db']:5.1f}, SSIM {row['ssim']:.4f}, latent {row['latent']:.2e}"
        for name, row in record["fidelity"].items()
    ]
    lines += [goal_line(goal) for goal in record["goals"]]
    lines += [f"no figures: {name}: {why}" for name, why in record["withheld"].items()]
    lines += [
        f"failed {count} times: {why}" for why, count in Counter(record["failures"].values()).most_common()
    ]
    if late := record.get("late"):
        lines.append(f"not done by the deadline: {len(late)}")
    return "\n".join(lines)


def goal_line(goal: Mapping[str, Any]) -> str:
    value = "    none" if goal["value"] is None else f"{goal['value']:8.4f}"
    line = f"{'met   ' if goal['passed'] else 'MISSED'}  {goal['metric']:<30} {value}  goal {goal['rule']} {goal['goal']}"
    if "of" in goal:
        error = "" if goal["error"] is None else f" +- {goal['error']:.4f}"
        line += f"  ({goal['of']},{error} from {goal['clips']} clips)"
    return line


if __name__ == "__main__":
    sys.exit(main())
