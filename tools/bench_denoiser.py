"""Time, memory, kernels and error of the denoiser beside diffusers, in one process on one GPU.

    python tools/bench_denoiser.py --out bench/results            everything but the full job, about 350 s; --deadline-s cuts its end
    python tools/bench_denoiser.py --out F.json --only job --skip-peers --full-job [--steps 4]
    python tools/bench_denoiser.py --out F.json --only 720,first --vae bench/results/GPU/X-vae.json
    python tools/bench_denoiser.py --smoke --out /tmp/f.json      the same code on a CPU, tiny sizes

Variants take turns call by call, so that drift of the clocks meets all alike. The file is rewritten after every section, a
failing section does not stop the next, and the exit code says whether all of them passed. Random weights and inputs; the
call excludes what is prepared once per clip, which is timed apart. `composed_job` in the record is no run: it adds up the
seconds of a whole job from measured calls, and from the VAE's in the record that --vae names. Section `first` starts two new
processes, without and with compiled kernels on disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools"), str(ROOT)]

from trace import trace  # noqa: E402

import first_call  # noqa: E402
import published  # noqa: E402
from composed import composed  # noqa: E402
from denoiser import GRIDS, STEP, Bench, Call  # noqa: E402
from denoiser_summary import goals, summary  # noqa: E402
from peers import Diffusers  # noqa: E402
from published import gib, relative_l2  # noqa: E402
from records import destination, environment  # noqa: E402

from cosmos_fast import costs, dispatch, ops, sampler, testing  # noqa: E402
from cosmos_fast.graphs import Graphed  # noqa: E402

PLAIN = {name: "reference" for name in dispatch.TABLE if name != "attention"}
PLAIN |= {"linear_gelu": "composed", "linear_head_norm": "composed"}
"""What torch offers: the reference of every op but those around a product, which stays torch's own, in bf16."""

FAST_OPS = (
    "adaln",
    "residual",
    "residual_adaln",
    "head_norm",
    "qk_norm_rope",
    "gelu",
    "linear_gelu",
    "linear_head_norm",
)
SECTIONS = ("720", "trace", "block", "accuracy", "image", "waterfall", "first", "480", "job")
"""In order of importance: a deadline cuts the end off."""

# --- sections --------------------------------------------------------------------------------------


def case(b: Bench, name: str) -> None:
    """Single call, guided pair and the peers at one grid, in turns."""
    grid = b.grids[name]
    given = published.inputs(b.config, grid, b.device, torch.bfloat16)
    T, H, W = grid
    flop = costs.network_flop(T * H * W // 4, b.config)
    out: dict[str, Any] = {"grid": grid, "tokens": T * H * W // 4, "call_flop": flop}
    b.record["cases"][name] = out
    start = b.sync()
    single, pair = published.bind(b.network, given)
    out["prepare_first_s"] = b.sync() - start
    z = given.z[None]
    calls: dict[str, Call] = {"ours": lambda: single(z, STEP), "ours_pair": lambda: pair(z, STEP)}
    first = {"ours": b.timed(calls["ours"])}
    memory = {key: b.memory(call) for key, call in calls.items()}
    out["prepare_s"] = b.timed(lambda: published.bind(b.network, given))
    if name != "720" and b.device.type == "cuda":
        try:
            graphed = Graphed(pair)
            first["ours_pair_graph"] = b.timed(lambda: graphed(z, STEP))
            eager, replayed = pair(z, STEP), graphed(z, STEP)
            same = all(torch.equal(x, y) for x, y in zip(eager, replayed, strict=True))
            out["graph"] = {
                "bitwise_equal": same,
                "capture_s": graphed.capture_s,
                "pool_gib": gib(graphed.pool_bytes),
            }
            calls["ours_pair_graph"] = lambda: graphed(z, STEP)
        except Exception as error:  # graphs are optional: the case still counts, the reason is kept
            out["graph"] = {"error": f"{type(error).__name__}: {error}"}
    if name != "720":
        torch._dynamo.reset()  # another size is another program; without this the limit on recompilations is reached
    try:
        for key, call in b.peer_calls(given).items():
            first[key] = b.timed(call)
            memory[key] = b.memory(call)
            calls[key] = call
    except Exception as error:  # ours counts without a peer, and the record says why there is none
        out["peer_error"] = f"{type(error).__name__}: {str(error)[:1000]}"
        print(f"{name}: {out['peer_error']}", flush=True)
    out["first_call_s"] = first
    rounds = b.args.rounds if name == "720" else 2 * b.args.rounds
    rows = b.interleave(calls, rounds, name)
    own = gib(published.weight_bytes(b.network))
    for key, row in rows.items():
        work = 2 * flop if "pair" in key else flop
        row["tflop_s"] = work / row["median_s"] / 1e12
        if b.peaks is not None:
            row["gemm_peak_pct"] = 100 * row["tflop_s"] / b.peaks.bf16_tflop_s
        row |= memory.get(key, {})
        if (
            "peak_gib" in row
        ):  # the peer works on our weights, so what it holds alone is its weights and its activations
            held = row["resident_gib"] if key.startswith("ours") else own
            row["own_peak_gib"] = row["peak_gib"] - row["resident_gib"] + held
    out["variants"] = rows


def traces(b: Bench) -> None:
    """Kernels of one call at the main grid: ours, and the compiled peer."""
    given = published.inputs(b.config, b.grids["720"], b.device, torch.bfloat16)
    single, pair = published.bind(b.network, given)
    calls: dict[str, Call] = {
        "ours": lambda: single(given.z[None], STEP),
        "ours_pair": lambda: pair(given.z[None], STEP),
    } | {key: call for key, call in b.peer_calls(given).items() if key == "diffusers_compiled"}
    b.record["trace"] = {}
    for name, call in calls.items():
        found = trace(call, b.device)
        b.record["trace"][name] = found.as_dict()
        print(f"\n== kernels: {name}\n{found.table(14)}", flush=True)


def waterfall(b: Bench) -> None:
    """One technique after the other at the main grid, each row on top of the one before."""
    given = published.inputs(b.config, b.grids["720"], b.device, torch.bfloat16)
    single, pair = published.bind(b.network, given)
    cudnn = {"attention": "cudnn" if b.device.type == "cuda" else "sdpa"}
    forced: dict[str, dict[str, str]] = {"plain": PLAIN | cudnn, "fused": cudnn, "attention": {}}

    def under(choice: dict[str, str]) -> Call:
        def call() -> None:
            with dispatch.use(**choice):
                single(given.z[None], STEP)

        return call

    calls = {name: under(choice) for name, choice in forced.items()}
    calls["shared_pair"] = lambda: pair(given.z[None], STEP)
    calls["attention"]()  # the clocks settle
    rows = b.interleave(calls, 2 if b.device.type == "cuda" else 1, "waterfall", settle_s=0.0)
    rows["shared_pair"]["per_call_s"] = rows["shared_pair"]["median_s"] / 2
    b.record["waterfall"] = rows


def accuracy(b: Bench) -> None:
    """Error of whole calls at a small grid against fp64 weights and products; two such references check each other."""
    grid = (4, 16, 24) if not b.args.smoke else (2, 4, 6)
    given = published.inputs(b.config, grid, b.device, torch.bfloat16)
    state = published.published(b.network)
    tau = given.times[STEP].to(b.device) * b.config.timestep_scale
    wide = given.to(torch.float64)
    exact_net = published.build(b.config, state, b.device, torch.float64)
    z = wide.z[None]
    with dispatch.use(**PLAIN, attention="reference"):
        exact = published.bind(exact_net, wide, rounded_rope=False)[0](z, STEP)[0]
    found: dict[str, float] = {}
    if (peer := b.theirs()) is not None:
        with peer.eager():
            theirs = Diffusers(b.config, published.published(exact_net))(wide.z, wide.control, wide.text, tau)
            found["diffusers_fp64"] = relative_l2(theirs, exact)
            exact = theirs  # wider inside than our reference ops, which work in fp32
            found["diffusers_bf16"] = relative_l2(peer(given.z, given.control, given.text, tau), exact)
    del exact_net
    b.clear()
    single = published.bind(b.network, given, rounded_rope=False)[0]
    found["ours_bf16"] = relative_l2(single(given.z[None], STEP)[0], exact)
    with dispatch.use(**PLAIN, attention="sdpa"):
        found["reference_ops_bf16"] = relative_l2(single(given.z[None], STEP)[0], exact)
    b.record["accuracy"] = {"grid": grid, "relative_l2": found} | _ratios(found)


def _ratios(found: dict[str, float]) -> dict[str, float]:
    keys = ("reference_ops_bf16", "diffusers_bf16")
    return {f"ours_over_{key}": found["ours_bf16"] / found[key] for key in keys if key in found}


def block(b: Bench) -> None:
    """Error of one whole block at the main grid, for sampled tokens, against fp64 throughout."""
    from exact_block import exact_block

    index, grid = 1, b.grids["720"]
    given = published.inputs(b.config, grid, b.device, torch.bfloat16)
    ctx = published.bind(b.network, given, rounded_rope=False)[0].ctx
    L = ctx.cos.shape[0]
    generator = torch.Generator(device=b.device).manual_seed(7)
    x = torch.randn(L, b.config.width, generator=generator, device=b.device, dtype=torch.bfloat16)
    rows = torch.randperm(L, generator=generator, device=b.device)[:512].sort().values
    tau = given.times[STEP].to(b.device) * b.config.timestep_scale
    state = published.published(b.network)
    exact = exact_block(b.config, state, index, x, rows, given.text, float(tau), ctx.cos, ctx.sin)

    def ours() -> Tensor:
        keys, mod = ctx.prompt.blocks[index], ctx.tables.blocks[index]
        y, pending = b.network.blocks[index](x.clone(), None, keys, mod, STEP, ctx)
        return ops.residual(y, pending, ctx.rows)[rows]

    found = {"ours_bf16": relative_l2(ours(), exact)}
    with dispatch.use(**PLAIN, attention="sdpa"):
        found["reference_ops_bf16"] = relative_l2(ours(), exact)
    if (peer := b.theirs()) is not None:
        with peer.eager():
            found["diffusers_bf16"] = relative_l2(peer.block(index, x, grid, given.text, tau)[rows], exact)
    b.record["block"] = {"grid": grid, "tokens": len(rows), "relative_l2": found} | _ratios(found)


def job(b: Bench) -> None:
    """All steps of the base schedule through the sampler, nothing in between, prepare included."""
    steps = b.args.steps
    given = published.inputs(b.config, b.grids["720"], b.device, torch.bfloat16, steps=steps)
    noise = sampler.noise(0, (1, b.config.latent_channels, *given.grid)).to(b.device)
    marks: list[Any] = []

    def told(index: int, total: int) -> None:
        if b.device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    b.clear()
    if b.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with b.watch("job"):
        start = b.sync()
        pair = published.bind(b.network, given)[1]
        prepared = b.sync()
        x0 = sampler.sample(pair, noise, sampler.base_schedule(steps), guidance=3.0, on_step=told)
        end = b.sync()
    if b.device.type == "cuda":
        gaps = [a.elapsed_time(c) / 1e3 for a, c in zip(marks, marks[1:])]
    else:
        gaps = [c - a for a, c in zip(marks, marks[1:])]
    whole = steps == 35
    b.record["job" if whole else "short_job"] = {
        "steps": steps, "calls": 2 * steps, "seconds": end - start, "prepare_s": prepared - start, "step_s": gaps,
        "latent_std": float(x0.std()), "gpu": b.watch.summary("job"),
        "peak_gib": gib(torch.cuda.max_memory_allocated()) if b.device.type == "cuda" else None,
    }  # fmt: skip


def first(b: Bench) -> None:
    """What a new process pays before its first call, with and without kernels that an earlier one compiled."""
    b.clear()
    grid = b.grids["image"]  # compiles the same kernels as a clip, and computes less
    with tempfile.TemporaryDirectory() as folder:
        b.record["first"] = first_call.cold_and_warm(grid, Path(folder), b.args.smoke)


def compose(b: Bench) -> None:
    """The whole job from what this run measured, and from a record of the VAE if one was named."""
    case = b.record["cases"].get("720", {})
    if "variants" not in case:
        return
    vae = (
        json.loads(b.args.vae.read_text(encoding="utf-8"))["cases"]["720"]["variants"] if b.args.vae else None
    )
    b.record["composed_job"] = composed(case, b.args.steps, vae, b.args.vae and b.args.vae.name)


# --- running them ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a .json file, or the folder bench/results")
    parser.add_argument("--grid", help="T,H,W of the latent in the main case (default 24,88,160)")
    parser.add_argument("--only", help=f"comma-separated sections of {', '.join(SECTIONS)}")
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--full-job", action="store_true", help="also run all steps without a break")
    parser.add_argument("--steps", type=int, default=35, help="of the job, run or composed")
    parser.add_argument("--vae", type=Path, help="a record of the VAE on this GPU, for the composed job")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--allow-reference", action="store_true", help="go on where an op has no fast version here"
    )
    parser.add_argument("--deadline-s", type=float, default=570, help="start no section after this")
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: checks this script")
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else [s for s in SECTIONS if s != "job"]
    wanted += ["job"] if args.full_job and "job" not in wanted else []
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only: sections are {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")

    testing.kernels_from_checkout()
    b = Bench(args, environment(args.commit))
    path = destination(args.out, b.record["environment"], "denoiser")
    steps: dict[str, Callable[[Bench], None]] = {
        "trace": traces, "waterfall": waterfall, "accuracy": accuracy, "block": block, "first": first, "job": job,
    }  # fmt: skip

    section = partial(b.section, path=path)
    section("build", b.build)
    chosen = {row["op"]: row["chosen"] for row in b.record.get("ops", [])}
    print(chosen, flush=True)
    slow = [op for op in FAST_OPS if chosen.get(op) == "reference"] + [
        a for a in ("attention",) if chosen.get(a) == "sdpa"
    ]
    if slow and not (args.allow_reference or args.smoke):
        print(
            f"bench_denoiser: no fast version of {', '.join(slow)} here: {b.record.get('ops')}. --allow-reference goes on."
        )
        return 3

    section("peaks", b.measure_peaks)
    for name in wanted:
        section(
            name, (lambda name=name: case(b, name)) if name in GRIDS else (lambda name=name: steps[name](b))
        )
    section("composed", lambda: compose(b))
    b.watch.close()
    print(f"\n{summary(b.record)}\n{goals(b.record)}\nwritten: {path}")
    return int(any(s["status"] != "ok" for s in b.record["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
