"""README tables and headline figures from the committed results; nothing else may write numbers into the README.

    python tools/report.py            rewrite the tables between <!-- report:NAME --> and <!-- /report:NAME -->
    python tools/report.py --check    exit 1 if that would change the README
    python tools/report.py --figures  one JSON object of headline figures

Results lie in bench/results/<gpu>/*.json. Each has `environment` (with `date`) and a `kind`, which says what else it has:
denoiser: any of `cases` (name -> `variants`, of whole calls), `waterfall`, `trace`, `accuracy`, `block`, `job`,
`composed_job`, `first`; vae: `cases` with the variants ours_encode, <peer>_encode, ...; pipeline: `clips`; prompt_encoder:
`modes`; embedded: `embedded`, `goals`; fidelity: `fidelity`, `layers`, `calls`; scaling: `loops`, `distilled`; kernels, also
where there is no `kind`: `rows`. Shown of a GPU is the newest result that has a part. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report_attention8
import report_embedded
import report_fidelity
import report_fp8
import report_job
import report_scaling
import report_vae

ROOT = Path(__file__).resolve().parents[1]
README, CARD = ROOT / "README.md", ROOT / "cosmos_fast" / "data" / "tiny" / "README.md"
PEERS = {"diffusers": "diffusers", "diffusers_compiled": "diffusers, blocks compiled"}
CASES = {"720": "93 frames, 720p", "480": "93 frames, 480p", "image": "1 image, 720p"}
STEPS = {
    "plain": "ours, plain PyTorch ops", "fused": "+ fused pointwise kernels",
    "attention": "+ best attention kernel", "shared_pair": "+ block 0 shared by both prompts",
}  # fmt: skip
Result = dict[str, Any]


class Results:
    """Committed results of one GPU kind, newest first; dry runs and sizes of one's own choice left out."""

    def __init__(self, folder: Path) -> None:
        loaded = []
        for path in folder.glob("*.json"):
            record = json.loads(path.read_text(encoding="utf-8"))
            args = record.get("args", {})
            if args.get("smoke") == "True" or args.get("grid", "None") != "None":
                continue  # a dry run, or sizes that the tables do not name
            loaded.append((str(record["environment"]["date"]), path.name, record))
        loaded.sort(key=lambda item: item[:2], reverse=True)
        self.gpu = folder.name
        self.files: list[tuple[str, Result]] = [
            (f"{folder.name}/{name}", record) for _, name, record in loaded
        ]

    def newest(self, get: Callable[[Result], Any]) -> tuple[str, Result, Any] | None:
        """(file, whole record, part) of the newest record in which `get` finds something."""
        for file, record in self.files:
            if part := get(record):
                return file, record, part
        return None

    def case(self, name: str, kind: str = "denoiser") -> tuple[str, Result, Any] | None:
        def variants(record: Result) -> Any:
            return record.get("kind") == kind and record.get("cases", {}).get(name, {}).get("variants")

        return self.newest(variants)

    def own(self, key: str, kind: str = "denoiser") -> tuple[str, Result, Any] | None:
        return self.newest(lambda record: record.get("kind") == kind and record.get(key))


def load(folder: Path) -> list[Results]:
    kinds = sorted(p for p in folder.glob("*") if p.is_dir() and p.name != "cpu") if folder.is_dir() else []
    return [found for found in map(Results, kinds) if found.files]


# --- tables: None where there is nothing to show ---------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    align = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rows))


def num(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def note(file: str, record: Result) -> str:
    env = record["environment"]
    smi = env.get("nvidia_smi") or {}
    parts = [f"{env['gpu']}", f"power limit {smi['power.limit']}" if "power.limit" in smi else "",
             f"torch {env['torch']}", f"CUDA {env['cuda']}", f"commit {str(env.get('commit') or 'unrecorded')[:8]}",
             str(env["date"])[:10], f"[{file}](bench/results/{file})"]  # fmt: skip
    return ", ".join(part for part in parts if part)


def _call(name: str, row: Result, calls: int, base: float, of: int = 1) -> list[str]:
    seconds, gpu = row["median_s"] * of, row.get("gpu", {})
    clock, power = (gpu.get(key, {}).get("median") for key in ("sm_mhz", "power_w"))
    return [
        name, str(calls), num(seconds), num(row["iqr_s"] * of), num(seconds / base, 2), num(row.get("tflop_s"), 0),
        num(row.get("gemm_peak_pct"), 0), num(row.get("own_peak_gib"), 1), num(clock, 0), num(power, 0),
    ]  # fmt: skip


def denoiser(r: Results) -> str | None:
    blocks = []
    for case, label in CASES.items():
        if (found := r.case(case)) is None:
            continue
        file, record, rows = found
        call, pair = rows["ours"]["median_s"], rows["ours_pair"]["median_s"]
        lines = [_call("ours", rows["ours"], 1, call)]
        lines += [_call(title, rows[peer], 1, call) for peer, title in PEERS.items() if peer in rows]
        lines.append(_call("ours, both prompts", rows["ours_pair"], 2, pair))
        if "ours_pair_graph" in rows:
            lines.append(_call("ours, both prompts, CUDA graph", rows["ours_pair_graph"], 2, pair))
        # The peers call the network once per prompt; two calls take twice one.
        lines += [_call(f"{title}, twice", rows[p], 2, pair, of=2) for p, title in PEERS.items() if p in rows]
        head = [label, "calls", "s", "IQR s", "time over ours", "TFLOP/s", "% of GEMM peak", "peak GiB",
                "SM MHz", "W"]  # fmt: skip
        blocks.append(f"{table(head, lines)}\n\n{note(file, record)}")
    return "\n\n".join(blocks) or None


def waterfall(r: Results) -> str | None:
    if (found := r.own("waterfall")) is None:
        return None
    file, record, steps = found
    rows, first = [], steps["plain"]["median_s"]
    for name, title in STEPS.items():
        if name in steps:
            seconds = steps[name].get("per_call_s", steps[name]["median_s"])
            rows.append([title, num(seconds), num(first / seconds, 2)])
    return f"{table(['one denoiser call, 93 frames, 720p', 's per call', 'speed over the first row'], rows)}\n\n{note(file, record)}"


def breakdown(r: Results) -> str | None:
    if (found := r.own("trace")) is None:
        return None
    file, record, traces = found
    rows = []
    for name, title in {"ours": "ours", "ours_pair": "ours, both prompts", **PEERS}.items():
        if name in traces:
            one = traces[name]
            kinds = [num(one["classes_ms"][kind], 1) for kind in ("attention", "gemm", "pointwise", "copy")]
            rows.append([title, *kinds, num(one["idle_ms"], 1), num(100 * one["other_share"], 2)])
    head = ["ms of one call", "attention", "GEMM", "pointwise", "copies", "gaps", "% not attention or GEMM"]
    return f"{table(head, rows)}\n\n{note(file, record)}"


def kernels(r: Results) -> str | None:
    """Each case from the newest file that has it: times of one case are only compared within one file."""
    rows, notes, seen = [], [], set()
    for file, record in r.files:
        if (
            record.get("kind", "kernels") != "kernels"
        ):  # the first records of kernels do not say what they are
            continue
        cases: dict[tuple[str, str], dict[str, Result]] = {}
        for row in record.get("rows", ()):
            if row["op"] != "network":  # whole calls have tables of their own
                cases.setdefault((row["op"], row["case"]), {})[row["candidate"]] = row
        shown = [line for case, by in cases.items() if case not in seen for line in _kernel(*case, by)]
        seen |= set(cases)
        rows += shown
        notes += [note(file, record)] if shown else []
    head = ["kernel, case", "version", "ms", "% of copy rate", "eager over it", "torch.compile over it"]
    return "\n\n".join([table(head, sorted(rows)), *notes]) if rows else None


def _kernel(op: str, case: str, by_name: dict[str, Result]) -> list[list[str]]:
    """One row for each version of ours."""
    times = {name: row.get("ms", row.get("median_ms")) for name, row in by_name.items()}
    rows = []
    for name in ("triton", "cuda", "native"):
        if (ms := times.get(name)) is not None:
            share = by_name[name].get(
                "gemm_pct", by_name[name].get("copy_pct", by_name[name].get("roofline_pct"))
            )
            peers = (
                _either(times, *names) for names in (("eager", "reference"), ("compiled", "torch.compile"))
            )
            over = [num(None if t is None else t / ms, 2) for t in peers]
            # What lasts microseconds cannot reach the rate of a long copy; a copy of as many bytes is the measure then.
            alike = by_name[name].get("equal_copy_graph_pct")
            told = num(share, 0) + (f"; {num(alike, 0)} of a copy as small" if alike is not None else "")
            rows.append([f"{op}, {case}", name, num(ms), told, *over])
    return rows


def _either(times: dict[str, Any], *names: str) -> Any:
    return next((times[name] for name in names if times.get(name) is not None), None)


def accuracy(r: Results) -> str | None:
    rows, last = [], None
    for key, label in (("accuracy", "whole call"), ("block", "one block, sampled tokens")):
        if (found := r.own(key)) is not None:
            last = found
            errors, grid = found[2]["relative_l2"], " x ".join(map(str, found[2]["grid"]))
            names = ("ours_bf16", "reference_ops_bf16", "diffusers_bf16")
            rows.append(
                [f"{label}, latent {grid}", *(f"{errors[n]:.2e}" if n in errors else "–" for n in names)]
            )
    if last is None:
        return None
    head = ["relative L2 against fp64", "ours, bf16", "plain PyTorch ops, bf16", "diffusers, bf16"]
    return f"{table(head, rows)}\n\n{note(last[0], last[1])}"


def job(r: Results) -> str | None:
    """One uninterrupted run where there is one, and what measured calls add up to, which says that it is no run."""
    found = [one for key in ("job", "composed_job") if (one := r.own(key)) is not None]
    rows = [row for _, _, part in found for row in report_job.rows(part, PEERS, num)]
    notes = dict.fromkeys(note(file, record) for file, record, _ in found)
    return "\n\n".join([table(report_job.HEAD, rows), *notes]) if rows else None


def clip(r: Results) -> str | None:
    """One clip from spec to mp4; the first of a process also compiles kernels."""
    if (found := r.own("clips", "pipeline")) is None:
        return None
    file, record, clips = found
    stages = list(clips[0]["stages"])
    rows = []
    for steps, one in zip(record["steps"], clips, strict=True):
        seconds = [one["stages"][stage]["seconds"] for stage in stages]
        peak = max(one["stages"][stage]["peak_bytes"] or 0 for stage in stages) / 2**30
        cells = (num(s, 1) for s in (*seconds, sum(seconds), peak))
        rows.append([f"{record['model']}, {steps} steps", *cells])
    head = ["one clip of 93 frames at 720p, s", *stages, "in all", "peak GiB"]
    return f"{table(head, rows)}\n\n{note(file, record)}"


def prompt_encoder(r: Results) -> str | None:
    """The published prompt encoder's memory, mode by mode; it never shares the GPU with the network."""
    if (found := r.own("modes", "prompt_encoder")) is None:
        return None
    file, record, modes = found
    rows = [
        [f"`{one['mode']}`", *(num(one[key], 1) for key in ("peak_gib", "seconds_first", "seconds_again"))]
        for one in modes
        if one["asked"] == one["mode"]
    ]
    head = [record["what"], "peak GiB", "first call, s", "again, s"]
    return f"{table(head, rows)}\n\n{note(file, record)}"


def embedded(r: Results) -> str | None:
    """The model inside the package on held-out clips: adherence beside its baselines and ceiling, then goals."""
    if (found := r.own("embedded", "embedded")) is None:
        return None
    file, record, one = found
    tables = (table(head, rows) for head, rows in report_embedded.tables(record["clips"], one))
    return "\n\n".join([*tables, report_embedded.verdict(record["goals"]), note(file, record)])


TABLES: dict[str, Callable[[Results], str | None]] = {
    "denoiser": denoiser, "waterfall": waterfall, "breakdown": breakdown, "kernels": kernels, "accuracy": accuracy, "job": job,
    "clip": clip, "prompt_encoder": prompt_encoder, "embedded": embedded, "fp8": lambda r: report_fp8.shown(r, table, note),
    "scaling": lambda r: report_scaling.shown(r, table, note), "fidelity": lambda r: report_fidelity.shown(r, table, note), "vae": lambda r: report_vae.shown(r, table, note),
}  # fmt: skip
MARK = re.compile(r"<!-- report:(\w+) -->\n(.*?)<!-- /report:\1 -->", re.DOTALL)


def fill(readme: str, results: list[Results]) -> str:
    """The README with every table between markers replaced. ValueError for a marker of no known table."""

    def one(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(
                f"report: tables are {', '.join(TABLES)}, got {name!r}. Fix the marker in README.md."
            )
        shown = [text for r in results if (text := TABLES[name](r)) is not None]
        body = "\n\n".join(shown) or "Not measured yet."
        return f"<!-- report:{name} -->\n{body}\n<!-- /report:{name} -->"

    opened = re.findall(r"<!-- report:(\w+) -->", readme)
    if sorted(opened) != sorted(m[1] for m in MARK.finditer(readme)):
        raise ValueError(
            "report: every <!-- report:NAME --> needs its <!-- /report:NAME --> on a later line."
        )
    return MARK.sub(one, readme)


def filled(path: Path, results: list[Results]) -> str:
    """A file with its tables filled, links to results as they are from there."""
    folder = path.resolve().parent
    up = "../" * (len(folder.relative_to(ROOT).parts) if folder.is_relative_to(ROOT) else 0)
    text = fill(path.read_text(encoding="utf-8"), results)
    return text.replace("](bench/results/", f"]({up}bench/results/")


# --- headline figures ------------------------------------------------------------------------------


def figures(results: list[Results]) -> dict[str, Result]:
    """Key -> value, unit, file, and peers where measured beside it. With several GPU kinds keys end in .<gpu>."""
    out: dict[str, Result] = {}
    for r in results:
        suffix = f".{r.gpu}" if len(results) > 1 else ""

        def put(key: str, value: float | None, unit: str, file: str, peer: dict[str, float] | None = None, end: str = suffix) -> None:  # fmt: skip
            if value is not None:
                out[key + end] = {"value": value, "unit": unit, "file": f"bench/results/{file}", "peer": peer or {}}  # fmt: skip

        for case in CASES:
            if (found := r.case(case)) is None:
                continue
            file, record, rows = found
            name = "" if case == "720" else f".{case}"
            peer = {p: rows[p]["median_s"] for p in PEERS if p in rows}
            peaks = {p: rows[p]["own_peak_gib"] for p in PEERS if "own_peak_gib" in rows.get(p, {})}
            pair, first = rows["ours_pair"], record["cases"][case].get("first_call_s", {})
            put(f"denoiser_call_s.exact{name}", rows["ours"]["median_s"], "s", file, peer)
            twice = {p: 2 * s for p, s in peer.items()}
            put(f"denoiser_pair_s.exact{name}", pair["median_s"], "s", file, twice)
            put(f"denoiser_peak_gib.exact{name}", pair.get("own_peak_gib"), "GiB", file, peaks)
            firsts = {p: first[p] for p in PEERS if p in first}
            put(f"denoiser_first_call_s.exact{name}", first.get("ours"), "s", file, firsts)
        if (found := r.own("trace")) is not None and "ours" in found[2]:
            peer = {p: found[2][p]["other_share"] for p in PEERS if p in found[2]}
            put("pointwise_share.exact", found[2]["ours"]["other_share"], "1", found[0], peer)
        for key, title in (("accuracy", "call_error"), ("block", "block_error")):
            if (found := r.own(key)) is not None:
                errors = dict(found[2]["relative_l2"])
                put(f"{title}.exact", errors.pop("ours_bf16"), "1", found[0], errors)
        if (found := r.own("job")) is not None:
            put("denoise_clip_s.exact", found[2]["seconds"], "s", found[0])
        for key in ("composed_job", "first"):
            if (found := r.own(key)) is not None:
                for name, value, peer in report_job.figures(key, found[2]):
                    put(name, value, "s", found[0], peer)
        if (found := r.own("clips", "pipeline")) is not None:
            stages = found[2][-1]["stages"].values()
            put("clip_s.exact", sum(stage["seconds"] for stage in stages), "s", found[0])
            put("clip_peak_gib.exact", max(s["peak_bytes"] or 0 for s in stages) / 2**30, "GiB", found[0])
        if (found := r.own("modes", "prompt_encoder")) is not None:
            for one in found[2]:
                if one["asked"] == one["mode"]:
                    put(f"prompt_encoder_peak_gib.{one['mode']}", one["peak_gib"], "GiB", found[0])
        if (found := r.own("embedded", "embedded")) is not None:
            for key, value, unit in report_embedded.figures(found[2]):
                put(key, value, unit, found[0])
        eight_bit = (*report_fp8.figures(r), *report_attention8.figures(r), *report_fidelity.figures(r))
        for key, value, unit, file, peer in eight_bit:
            put(key, value, unit, file, peer)
        if (found := r.own("loops", "scaling")) is not None:
            for key, gain in report_scaling.gains(found[1]).items():
                put(f"scaling.{key}", gain, "x", found[0])
        for vae_file, vae in report_vae.newest(r):
            for key, value, unit, peer in report_vae.figures(vae):
                put(key, value, unit, vae_file, peer)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table differs")
    parser.add_argument("--figures", action="store_true", help="print headline figures as JSON")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--readme", type=Path, default=README)
    args = parser.parse_args(argv)
    results = load(args.results)
    if args.figures:
        print(json.dumps(figures(results), indent=1))
        return 0
    # The model's card has tables too; a README elsewhere stands alone.
    files = [args.readme, CARD] if args.readme == README else [args.readme]
    stale = [
        path for path in files if path.exists() and filled(path, results) != path.read_text(encoding="utf-8")
    ]
    for path in stale:
        if args.check:
            print(f"report: {path.name} differs from the result files. Run: python tools/report.py")
        else:
            path.write_text(filled(path, results), encoding="utf-8")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
