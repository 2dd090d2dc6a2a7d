"""What several GPUs of one machine make of one clip: exchange, a network call, the VAE, the few-step job; against one GPU.

    torchrun --nproc-per-node 2 tools/bench_parallel.py --out bench/results/2xh200.json
    torchrun --nproc-per-node 2 tools/bench_parallel.py --smoke --out /tmp/f.json       the same code on CPUs, tiny sizes

Every rank also runs the one-rank version, so both see the same clocks. Times are those of the slowest rank, the median of
`--rounds` after one that warms up. A line per result at once; the file is rewritten after every section. A section that
fails on one rank leaves the others waiting: they give up after `--patience-s`, and the file holds what came before.
Random weights and inputs of the published sizes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools"), str(ROOT)]

import published  # noqa: E402
from published import relative_l2  # noqa: E402
from records import environment  # noqa: E402

from cosmos_fast import dispatch, testing  # noqa: E402
from cosmos_fast.config import NetworkConfig  # noqa: E402
from cosmos_fast.exchange import Exchanged, exact_attend, exact_operands, fp8_attend, fp8_operands  # noqa: E402
from cosmos_fast.network import Network, Pair, Single  # noqa: E402
from cosmos_fast.parallel import Halves, Mesh, Ranks, Shard  # noqa: E402
from cosmos_fast.recipe import Plan  # noqa: E402
from cosmos_fast.self_attention import exact  # noqa: E402
from cosmos_fast.self_attention8 import Fp8  # noqa: E402
from cosmos_fast.vae import VAE, VAEConfig, channels_last_  # noqa: E402
from cosmos_fast.vae_split import SharedVAEStage  # noqa: E402
from cosmos_fast.vae_stage import Request, VAEStage  # noqa: E402

Call = Callable[[], Any]
STEP = 3
DISTILLED_STEPS = 4


class Bench:
    """The meshes of this run, the sizes, and what was measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.size = args, Ranks.from_environment().size
        device = "cpu" if args.smoke else "cuda"
        self.mesh = Mesh.open(Plan(device=device, context=self.size), timeout_s=args.patience_s)
        self.device, self.dtype = self.mesh.device, torch.float32 if args.smoke else torch.bfloat16
        self.halves = None
        if self.size % 2 == 0:
            self.halves = Mesh.open(
                Plan(device=device, context=self.size // 2, cfg=2), timeout_s=args.patience_s
            )
        small = dict(width=96, heads=4, blocks=4, control_every=2, adaln_rank=8, image_width=None)
        self.config = NetworkConfig.tiny(**small) if args.smoke else NetworkConfig.single()
        self.grid = (3, 8, 12) if args.smoke else (24, 88, 160)
        self.frames = 9 if args.smoke else 93
        self.started, self.record = time.perf_counter(), {"ranks": self.size, "grid": self.grid}

    def timed(self, call: Call, rounds: int | None = None) -> float:
        """Median seconds on the slowest rank, all starting together."""
        seconds = []
        for _ in range(1 + (rounds or self.args.rounds)):
            self.mesh.world.hear(None)
            self.sync()
            start = time.perf_counter()
            call()
            self.sync()
            seconds.append(max(self.mesh.world.hear(time.perf_counter() - start)))
        return statistics.median(seconds[1:])

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def tell(self, **values: Any) -> dict[str, Any]:
        if self.mesh.is_first:
            shown = ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
            )
            print(f"[{time.perf_counter() - self.started:6.1f} s] {shown}", flush=True)
        return values

    def same(self, x: Tensor) -> bool:
        """Whether all ranks hold the same bits."""
        words = x.contiguous().flatten().view(torch.uint8).long()
        return (
            len(
                set(
                    self.mesh.world.hear(
                        int((words * (1 + torch.arange(len(words), device=x.device) % 8191)).sum())
                    )
                )
            )
            == 1
        )


# --- sections --------------------------------------------------------------------------------------


def exchange(b: Bench) -> dict[str, Any]:
    """One self-attention of a block: its parts alone, together, and what of the exchange stays visible."""
    T, H, W = b.grid
    L, N, K = T * H * W // 4, b.config.heads, b.config.head_width
    g = torch.Generator(b.device).manual_seed(0)
    qkv = torch.randn(L, 3 * N * K, generator=g, device=b.device, dtype=b.dtype)
    gains = torch.ones(2, K, device=b.device, dtype=b.dtype).unbind(0)
    angles = torch.rand(L, K // 2, generator=g, device=b.device) * 3
    cos, sin = angles.cos(), angles.sin()
    shard = Shard(b.mesh.context, L)
    own, at = shard.split(qkv).contiguous(), (shard.split(cos), shard.split(sin))
    whole = exact(qkv, *gains, cos, sin, STEP)
    out: dict[str, Any] = {"tokens": L, "heads": N}
    found = shard.join(Exchanged(b.mesh.context)(own, *gains, cos, sin, STEP))
    out |= b.tell(what="exact", bitwise=torch.equal(found, whole), relative_l2=relative_l2(found, whole))
    n = max(1, N // b.size)
    few = qkv[:, : 3 * n * K].contiguous()
    q, k, v = few.view(L, 3, n, K).unbind(1)
    sent = torch.empty(L, 3 * n * K * qkv.element_size(), dtype=torch.uint8, device=b.device)
    sizes = shard.sizes
    send = sum(sizes[: b.size]) if b.size == 1 else sizes[b.mesh.context.rank] * b.size
    rows = sent.new_zeros(send, sent.shape[1])
    to = [sizes[b.mesh.context.rank]] * b.size
    out["sent_bytes"] = rows.numel() * (b.size - 1) // b.size * 4 // 3
    parts: dict[str, Call] = {
        "one_rank": lambda: exact(qkv, *gains, cos, sin, STEP),
        "produce": lambda: exact_operands(own, *gains, *at, b.mesh.context),
        "attend": lambda: exact_attend(exact_like(q, k, v), b.dtype),
        "all_to_all_qkv": lambda: b.mesh.context.all_to_all(rows, to, sizes).wait(),
    }
    for count in (1, 2, 4):
        parts[f"together_{count}"] = partial(
            Exchanged(b.mesh.context, parts=count), own, *gains, cos, sin, STEP
        )
    if not b.args.smoke:
        parts["one_rank_fp8"] = lambda: Fp8()(qkv, *gains, cos, sin, STEP)
        parts["together_fp8"] = partial(
            Exchanged(b.mesh.context, fp8_operands, fp8_attend), own, *gains, cos, sin, STEP
        )
    for name, call in parts.items():
        try:
            out[f"{name}_s"] = b.timed(call)
            b.tell(what=name, ms=1e3 * out[f"{name}_s"])
        except RuntimeError as error:  # an 8-bit library that is not there; the same on all ranks
            out[f"{name}_error"] = str(error)[:300]
            b.tell(what=name, error=str(error)[:200])
    gbs = out["sent_bytes"] * 3 / 4 / out["all_to_all_qkv_s"] / 1e9
    best = min(out[f"together_{count}_s"] for count in (1, 2, 4))
    out |= b.tell(
        all_to_all_gb_s=gbs, efficiency=out["one_rank_s"] / b.size / best,
        visible_ms=1e3 * (best - out["produce_s"] - out["attend_s"]),
    )  # fmt: skip
    if b.device.type == "cuda":
        out["trace"] = overlap(b, parts["together_2"])
        b.tell(**out["trace"])
    return out


def exact_like(q: Tensor, k: Tensor, v: Tensor) -> Any:
    from cosmos_fast.exchange import Operands

    return Operands((q,), (k, v))


def overlap(b: Bench, call: Call) -> dict[str, float]:
    """Milliseconds of exchange of one call, and how much of it runs while something else does, from a trace."""
    from torch.profiler import ProfilerActivity, profile

    b.mesh.world.hear(None)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        b.sync()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    hidden = total = 0.0
    for start, end in spans[True]:
        total += end - start
        edges = sorted((max(start, s), min(end, e)) for s, e in spans[False] if s < end and e > start)
        reached = start
        for s, e in edges:
            hidden += max(0.0, e - max(s, reached))
            reached = max(reached, e)
    return {"exchange_ms": total / 1e3, "hidden_ms": hidden / 1e3}


def network(b: Bench) -> dict[str, Any]:
    """A call of one prompt and of both, on one rank and on all."""
    given = published.inputs(b.config, b.grid, b.device, b.dtype)
    state = published.random_state(b.config, device=b.device, dtype=b.dtype)
    alone = published.build(b.config, state, b.device, b.dtype)
    del state

    def on(mesh: Mesh) -> Network:
        with torch.device("meta"):
            made = Network(
                b.config, Exchanged(mesh.context) if mesh.context.size > 1 else exact, mesh.context
            )
        made.load_state_dict(alone.state_dict(), strict=True, assign=True)
        return made.eval().requires_grad_(False)

    z, out = given.z[None], {}
    single, pair = published.bind(alone, given)
    calls: dict[str, Call] = {"single": lambda: single(z, STEP), "pair": lambda: pair(z, STEP)}
    spread_single, spread_pair = published.bind(on(b.mesh), given)
    calls |= {"context_single": lambda: spread_single(z, STEP), "context_pair": lambda: spread_pair(z, STEP)}
    if b.halves is not None:
        both: Pair = published.bind(on(b.halves), given)[1]
        ctx = both.cond if b.halves.cfg.rank == 0 else both.uncond
        assert ctx is not None
        halves = Halves(Single(both.network, ctx), b.halves.cfg)
        calls["cfg_pair"] = lambda: halves(z, STEP)
    exact_pair = calls["pair"]()
    for name in ("context_pair", "cfg_pair"):
        if name in calls:
            got = calls[name]()
            out |= b.tell(
                **{
                    f"{name}_relative_l2": max(
                        relative_l2(x, y) for x, y in zip(got, exact_pair, strict=True)
                    ),
                    f"{name}_same_on_all": all(b.same(x) for x in got),
                    f"{name}_bitwise": all(map(torch.equal, got, exact_pair)),
                }
            )
    for name, call in calls.items():
        out[f"{name}_s"] = b.timed(call, 2)
        base = out["pair_s" if "pair" in name else "single_s"] if name not in ("single", "pair") else None
        b.tell(what=name, seconds=out[f"{name}_s"], speedup=base / out[f"{name}_s"] if base else 1.0)
    b.record["single"] = {"one": out["single_s"], "all": out["context_single_s"]}
    return out


def vae(b: Bench) -> dict[str, Any]:
    """Encode of one and of two clips, and a decode, on one rank and on all."""
    torch.manual_seed(0)
    with torch.device(b.device):
        model = VAE(VAEConfig(base=4) if b.args.smoke else VAEConfig()).to(b.dtype)
    model = channels_last_(model) if b.device.type == "cuda" else model
    _, H, W = b.grid
    clip = torch.randint(0, 256, (b.frames, 8 * H, 8 * W, 3), dtype=torch.uint8).numpy()
    request = Request([lambda start, stop: clip[start:stop]], clip.shape[:3])
    given = model, Plan(), b.device, b.dtype
    alone, shared = VAEStage(*given), SharedVAEStage(*given, b.mesh.world)
    out: dict[str, Any] = {}
    z = alone.encode(request)
    latents = shared.encode_all([request])[0]
    assert latents is not None
    out |= b.tell(encode_relative_l2=relative_l2(latents, z), encode_same_on_all=b.same(latents))
    frames = [torch.from_numpy(part) for part in alone.decode(z, b.frames)]
    others = [torch.from_numpy(part) for part in shared.decode(z, b.frames)]
    gaps = torch.cat([(x.int() - y.int()).abs().flatten() for x, y in zip(frames, others, strict=True)])
    out |= b.tell(decode_most_codes_off=int(gaps.max()), decode_share_off=float((gaps > 0).float().mean()))
    calls: dict[str, Call] = {
        "encode": lambda: alone.encode(request),
        "encode_shared": lambda: shared.encode_all([request]),
        "encode_two_shared": lambda: shared.encode_all([request, request]),
        "decode": lambda: [None for _ in alone.decode(z, b.frames)],
        "decode_shared": lambda: [None for _ in shared.decode(z, b.frames)],
    }
    for name, call in calls.items():
        out[f"{name}_s"] = b.timed(call, 2)
        base = out[f"{name.split('_')[0]}_s"] * (2 if "two" in name else 1)
        b.tell(what=name, seconds=out[f"{name}_s"], speedup=base / out[f"{name}_s"])
    if (calls_s := b.record.get("single")) is not None:
        one = out["encode_s"] + DISTILLED_STEPS * calls_s["one"] + out["decode_s"]
        many = out["encode_shared_s"] + DISTILLED_STEPS * calls_s["all"] + out["decode_shared_s"]
        out |= b.tell(distilled_one_s=one, distilled_all_s=many, distilled_speedup=one / many)
    return out


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "exchange": exchange,
    "network": network,
    "vae": vae,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a .json file, written by the first rank")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections of {', '.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deadline-s", type=float, default=200, help="start no section after this")
    parser.add_argument("--patience-s", type=float, default=60, help="longest wait for another rank")
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on CPUs: checks this script")
    args = parser.parse_args(argv)
    if unknown := set(args.only.split(",")) - set(SECTIONS):
        parser.error(f"--only: sections are {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    testing.kernels_from_checkout()
    b = Bench(args)
    b.record |= {"environment": environment(args.commit), "sections": {}}
    failed = 0
    for name in args.only.split(","):
        late = any(b.mesh.world.hear(time.perf_counter() - b.started > args.deadline_s))
        entry: dict[str, Any] = {"status": "skipped" if late else "ok"}
        if not late:
            try:
                with torch.inference_mode():
                    entry |= SECTIONS[name](b)
            except Exception as error:  # what came before is kept
                entry |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
                print(f"rank {b.mesh.ranks.rank}: {name}: {entry['error']}", flush=True)
                failed = 1
        b.record["sections"][name] = entry
        b.record["kernels"] = dispatch.used()
        if b.mesh.is_first:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(b.record, indent=1) + "\n", encoding="utf-8")
        if failed:
            break
        if b.device.type == "cuda":
            torch.cuda.empty_cache()
    if b.mesh.is_first:
        print(json.dumps(b.record["sections"]), flush=True)
    b.mesh.close()
    return failed


if __name__ == "__main__":
    sys.exit(main())
