"""Time and error of 8-bit linear layers, and of whole calls of the denoiser by recipe, beside their peers on one GPU.

    python tools/bench_fp8.py --out bench/results [--only linears,call] [--deadline-s 140] [--rounds 5]
    python tools/bench_fp8.py --smoke --out /tmp/f.json      the same code on a CPU, tiny sizes

linears: the products of a block at 84,480 tokens, what quantises their rows, the MLP's first layer with GELU, and a whole
block without its attention, every way in turns: bf16, ours through torch's product and through our kernel, Transformer
Engine with current and with delayed scaling; with the error of each against fp64 of the unquantised layer, on sampled
rows. call: one call at 93 frames of 720p with the recipe exact, 8-bit linear layers, 8-bit linear layers and attention,
and compiled diffusers, in turns, with memory, and how far each is from exact. A way that cannot run here is recorded with
its reason. No part is started after the deadline; the file is rewritten after every part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools"), str(ROOT)]

import published  # noqa: E402
from denoiser import STEP, Bench  # noqa: E402
from fp8_linears import Call, Linears  # noqa: E402
from published import gib, relative_l2  # noqa: E402
from records import destination, environment  # noqa: E402

from cosmos_fast import quant, testing  # noqa: E402
from cosmos_fast.network import Network  # noqa: E402
from cosmos_fast.network_keys import to_ours  # noqa: E402
from cosmos_fast.self_attention import exact  # noqa: E402

SECTIONS = ("linears", "call")


def whole_call(b: Bench) -> None:
    """One call of the denoiser by recipe, and the peer's."""
    state = published.random_state(b.config, 0, b.device)
    given = published.inputs(b.config, b.grids["720"], b.device, torch.bfloat16)

    def network(linear: str, attend: Any = exact) -> Network:
        with torch.device("meta"):
            net = Network(b.config, attend)
        return quant.loaded(net, to_ours(state, b.config, torch.bfloat16, b.device), linear)

    def both() -> Network:
        from cosmos_fast.self_attention8 import fp8

        return network("fp8", fp8(b.device))

    makers = {"exact": lambda: network("bf16"), "fp8_linear": lambda: network("fp8"), "fp8": both}
    if b.args.te:
        makers["fp8_te"] = lambda: network("fp8_te")
    out: dict[str, Any] = {"grid": b.grids["720"], "recipes": {}, "variants": {}}
    b.record["call"] = out
    calls: dict[str, Call] = {}
    exact_v: Tensor | None = None
    with torch.no_grad():
        for name, make in makers.items():
            try:
                net = make()
                single = published.bind(net, given)[0]
                call = lambda single=single: single(given.z[None], STEP)  # noqa: E731
                start = b.sync()
                v = call()
                row: dict[str, Any] = {"first_call_s": b.sync() - start, "weights_gib": gib(held_bytes(net))}
                row |= b.memory(call)
                if "peak_gib" in row:
                    row["own_peak_gib"] = row["peak_gib"] - row["resident_gib"] + row["weights_gib"]
                exact_v = v if exact_v is None else exact_v
                row["relative_l2_to_exact"] = relative_l2(v, exact_v)
                calls[name] = call
                if name == "exact":
                    b.network = net
            except Exception as error:  # a recipe this machine lacks must not end the comparison
                row = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            out["recipes"][name] = row
            print(f"call {name}: {row}", flush=True)
        if not b.args.skip_peers:
            try:
                compiled = b.peer_calls(given)["diffusers_compiled"]
                out["recipes"]["diffusers_compiled"] = {"first_call_s": b.timed(compiled)}
                calls["diffusers_compiled"] = compiled
            except Exception as error:
                out["recipes"]["diffusers_compiled"] = {
                    "error": f"{type(error).__name__}: {str(error)[:500]}"
                }
        out["variants"] = b.interleave(calls, b.args.rounds, "call", settle_s=1.0)
    for name, row in out["variants"].items():
        print(f"call {name:20s} {row['median_s']:8.4f} s  iqr {row['iqr_s']:.4f}  {row['gpu']}", flush=True)


def held_bytes(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in (*net.parameters(), *net.buffers()))


def te_version() -> str | None:
    try:
        return str(import_module("transformer_engine").__version__)
    except Exception as error:  # absent or broken: what it says is the record
        return f"{type(error).__name__}: {str(error)[:200]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a .json file, or the folder bench/results")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--grid", help="T,H,W of the latent (default 24,88,160)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--te", action="store_true", help="also a whole call with Transformer Engine's layers"
    )
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--deadline-s", type=float, default=140, help="start no part after this")
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: checks this script")
    args = parser.parse_args(argv)
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only: sections are {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    testing.kernels_from_checkout()
    b = Bench(args, environment(args.commit))
    b.record |= {"kind": "fp8", "transformer_engine": te_version(), "linears": {}}
    path = destination(args.out, b.record["environment"], "fp8")
    linears = Linears(b)
    D, M = linears.c.width, linears.c.mlp_width
    parts: dict[str, dict[str, Callable[[], None]]] = {
        "linears": {
            "proof": lambda: quant.prove(b.device), "fc1": linears.mlp, "block": linears.block,
            "qkv": lambda: linears.product("qkv", D, 3 * D), "out": lambda: linears.product("out", D, D),
            "fc2": lambda: linears.product("fc2", M, D), "rounding": linears.rounding,
        },
        "call": {"call": lambda: whole_call(b)},
    }  # fmt: skip
    for name, run in ((name, run) for section in wanted for name, run in parts[section].items()):
        b.section(name, run, path)
    b.watch.close()
    print(f"written: {path}")
    return int(any(s["status"] == "failed" for s in b.record["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
