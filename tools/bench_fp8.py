"""Time and error of 8-bit linear layers, and of whole calls of the denoiser by recipe, beside their peers on one GPU.

    python tools/bench_fp8.py --out bench/results [--only call,te] [--deadline-s 300] [--rounds 3]
    python tools/bench_fp8.py --smoke --out /tmp/f.json      the same code on a CPU, tiny sizes

call: one call at 93 frames of 720p with the recipe exact, 8-bit linear layers and attention by each library, 8-bit linear
layers alone, and compiled diffusers: memory, distance from exact, then all in turns as often as the deadline allows, then the
kernels of a call and the share that rounding has. te: a block, its products and a whole call with Transformer Engine's
layers, current and delayed scaling, beside ours and bf16. linears: the products of a block at 84,480 tokens, what quantises
their rows, the MLP's first layer with GELU by tile. budget: the error of a velocity with one kind of layer in 8 bits at a
time, those that the rule leaves in bf16 too, and of all at several steps. Errors of products are against fp64 of the
unquantised layer, on sampled rows.

Transformer Engine needs nothing set where torch's cuDNN is the only one or lies in a folder of its own; should its import fail
over cuDNN, CUDNN_HOME and LD_LIBRARY_PATH name that folder. Peers are imported as if it were absent.

--without leaves parts out, by their names in the record, such as "call libraries". A way that cannot run here is recorded with its reason. No part is started after the deadline; the file is rewritten after
every part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools"), str(ROOT)]

from denoiser import STEP, Bench  # noqa: E402
from fp8_calls import Calls  # noqa: E402
from fp8_linears import Linears  # noqa: E402
from records import destination, environment  # noqa: E402

from cosmos_fast import quant, testing  # noqa: E402

KEPT_S, TE_ROUNDS = {"call": 20, "te": 50, "linears": 20, "budget": 65}, 2
"""Seconds of the deadline that the turns of section call leave to what follows: its kernels, other sections. Turns of te."""


Parts = dict[str, Callable[[], None]]


@cache
def calls_of(b: Bench) -> Calls:
    """Those that sections share: what one made the next need not make again."""
    return Calls(b, "call" if "call" in b.args.only.split(",") else "te_call")


def call(b: Bench) -> Parts:
    kept = sum(KEPT_S[section] for section in b.args.only.split(","))
    peers: Parts = {} if b.args.skip_peers else {"call diffusers": lambda: calls_of(b).compiled()}
    return {
        "call exact": lambda: calls_of(b).recipe("exact", "bf16"),
        "call fp8": lambda: calls_of(b).recipe("fp8", "fp8", "fp8"),
        "call libraries": lambda: calls_of(b).libraries(),
        **peers,
        "call fp8_linear": lambda: calls_of(b).recipe("fp8_linear", "fp8"),
        "call times": lambda: calls_of(b).times(end_s=b.args.deadline_s - kept),
        "call kernels": lambda: calls_of(b).kernels(("exact", "fp8")),
    }


def te(b: Bench) -> Parts:
    """Each beside ours and bf16. The whole call beside the exact one, and ours where section call made it."""
    l = Linears(b)  # noqa: E741
    D, M = l.c.width, l.c.mlp_width

    def exact() -> None:
        if "exact" not in calls_of(b).calls:
            calls_of(b).recipe("exact", "bf16")

    return {
        "te proof": lambda: quant.prove(b.device), "te block": l.block, "te fc1": lambda: l.mlp(sweep=False),
        "te qkv": lambda: l.product("qkv", D, 3 * D), "te out": lambda: l.product("out", D, D),
        "te fc2": lambda: l.product("fc2", M, D), "te call exact": exact,
        "te call": lambda: calls_of(b).recipe("fp8_te", "fp8_te"),
        "te call times": lambda: calls_of(b).times(("exact", "fp8", "fp8_linear", "fp8_te"), TE_ROUNDS, b.args.deadline_s, "te_call"),
    }  # fmt: skip


def linears(b: Bench) -> Parts:
    l = Linears(b)  # noqa: E741
    D, M = l.c.width, l.c.mlp_width
    return {
        "proof": lambda: quant.prove(b.device), "fc1": l.mlp, "block": l.block,
        "qkv": lambda: l.product("qkv", D, 3 * D), "out": lambda: l.product("out", D, D),
        "fc2": lambda: l.product("fc2", M, D), "rounding": l.rounding,
    }  # fmt: skip


def budget(b: Bench) -> Parts:
    return {"budget": lambda: calls_of(b).budget((0, STEP, 34))}


SECTIONS: dict[str, Callable[[Bench], Parts]] = {"call": call, "te": te, "linears": linears, "budget": budget}


def te_version() -> str | None:
    """As its package says: importing it is for those who have torch's cuDNN first, see `te_linears`."""
    try:
        return version("transformer_engine")
    except PackageNotFoundError:
        return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a .json file, or the folder bench/results")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--without", default="", help="parts to leave out, separated by commas")
    parser.add_argument("--grid", help="T,H,W of the latent (default 24,88,160)")
    parser.add_argument("--rounds", type=int, default=4, help="turns, fewer where the deadline is near")
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--deadline-s", type=float, default=300, help="start no part after this")
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: checks this script")
    args = parser.parse_args(argv)
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only: sections are {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    testing.kernels_from_checkout()
    b = Bench(args, environment(args.commit))
    b.record |= {"kind": "fp8", "transformer_engine": te_version() if "te" in wanted else None}
    path = destination(args.out, b.record["environment"], "fp8")
    parts = [(name, run) for section in wanted for name, run in SECTIONS[section](b).items()]
    without = {name for name in args.without.split(",") if name}
    if unknown := without - {name for name, _ in parts}:
        parser.error(
            f"--without: parts are {', '.join(n for n, _ in parts)}, got {', '.join(sorted(unknown))}"
        )
    for name, run in parts:
        if name not in without:
            b.section(name, run, path)
    b.watch.close()
    print(f"written: {path}")
    return int(any(s["status"] == "failed" for s in b.record["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
