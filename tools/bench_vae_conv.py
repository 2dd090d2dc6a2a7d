"""Every conv of the video VAE at 93 frames of 704x1280, in every tile worth trying, beside cuDNN; and its norm.

    python tools/bench_vae_conv.py out.json [--seconds 110] [--only 96,norm] [--fp8] [--workers 12] [--quick]

First all Triton choices are compiled, in processes of their own: what crashes there is left out here. Then each conv, on
random data and in the layout of a pass in windows of one latent frame, is checked against fp32 on two corners of its
result and timed: Triton tile by tile, cuDNN in three dimensions, and cuDNN in two with the frames before in the channels,
with and without the copy that puts them there. TFLOP/s count the taps of the published conv. Then windows of a whole
decode and encode with what their kernels took, the norm beside a copy, and attention of the middle block. Lines appear as they
are known; at the deadline what is left is named and left out. --device cpu with TRITON_INTERPRET=1 is a dry run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from cosmos_fast import convolution as library  # noqa: E402
from cosmos_fast import testing  # noqa: E402
from cosmos_fast.attention import memory_efficient  # noqa: E402

testing.kernels_from_checkout()

import vae_layers  # noqa: E402
from cosmos_fast.kernels import norm_silu as norm  # noqa: E402
from cosmos_fast.kernels.attention_wide import attention_wide  # noqa: E402
from cosmos_fast.kernels.conv_tiles import FASTEST, FASTEST_FP8, Tiles  # noqa: E402
from cosmos_fast.kernels.launch import Config  # noqa: E402
from records import environment  # noqa: E402
from vae_layers import CORNER, Layer, call, choices, compiled, layers, operands, relative, told  # noqa: E402

MS = 120.0  # of launches for one figure
UNITS = {"tflop_s": "TF/s", "gb_s": "GB/s"}


# --- measuring ---------------------------------------------------------------------------------------


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.gpu = options.device == "cuda"
        self.end = time.perf_counter() + options.seconds
        self.rows: list[dict[str, Any]] = []

    def late(self, margin: float = 3.0) -> bool:
        return time.perf_counter() > self.end - margin

    def ms(self, run: Callable[[], Any]) -> float:
        if not self.gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        run()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        run()
        marks[1].record()
        marks[1].synchronize()
        once = max(marks[0].elapsed_time(marks[1]), 1e-3)
        count, spans = max(int(MS / 3 / once), 1), []
        for _ in range(3):
            marks[0].record()
            for _ in range(count):
                run()
            marks[1].record()
            marks[1].synchronize()
            spans.append(marks[0].elapsed_time(marks[1]) / count)
        return median(spans)

    def row(self, part: str, name: str, run: Callable[[], Any], check: Callable[[Any], float] | None = None, **extra: Any) -> float | None:  # fmt: skip
        """One line: error if it can be checked, milliseconds, rates that `extra` asks for (flop, bytes)."""
        if self.late():
            return None
        row: dict[str, Any] = {"part": part, "name": name}
        try:
            if check is not None:
                row["error"] = check(run())
            row["ms"] = self.ms(run)
            if "flop" in extra:
                row["tflop_s"] = extra["flop"] / row["ms"] / 1e9
            if "bytes" in extra:
                row["gb_s"] = extra["bytes"] / row["ms"] / 1e6
        except Exception as error:
            row["fault"] = f"{type(error).__name__}: {str(error)[:200]}"
        self.rows.append(row)
        rate = next((f"{row[key]:6.0f} {unit}" for key, unit in UNITS.items() if key in row), "")
        error = f"err {row['error']:.2e}" if "error" in row else ""
        outcome = row["fault"] if "fault" in row else f"{row['ms']:8.3f} ms"
        print(f"  {name:46s} {outcome} {rate} {error}", flush=True)
        return row.get("ms")


def folded(x: Tensor, w: Tensor, b: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The conv in two dimensions, past frames in the channels: with the copy that puts them there, and without."""
    t, frames = w.shape[2], x.shape[2] - w.shape[2] + 1
    taps = w.permute(0, 2, 1, 3, 4).flatten(1, 2).contiguous(memory_format=torch.channels_last)

    def gather() -> Tensor:
        rows = x[0].permute(1, 2, 3, 0)
        return torch.cat([rows[i : i + frames] for i in range(t)], dim=-1).permute(0, 3, 1, 2)

    wide = gather()
    return lambda: F.conv2d(gather(), taps, b).transpose(0, 1)[None], lambda: F.conv2d(wide, taps, b)


def one_conv(run: Run, layer: Layer, faults: dict[tuple[Layer, Tiles], str]) -> dict[str, float]:
    """Milliseconds of every way to compute one conv."""
    flop = f"{layer.flop / 1e12:.3f} TFLOP, decode x{layer.decode:g}, encode x{layer.encode:g}"
    print(f"{layer.name}  {flop}", flush=True)
    args = operands(layer, run.options.device, True)
    times: dict[str, float] = {}

    def timed(name: str, go: Callable[[], Tensor], checked: bool = True) -> None:
        check = (lambda y: relative(y, layer, args)) if checked else None
        ms = run.row(layer.name, name, go, check, flop=layer.flop)
        if ms is not None:
            times[name] = ms

    for tiles in choices(layer):
        if fault := faults.get((layer, tiles)):
            print(f"  {told(tiles):46s} left out: {fault}", flush=True)
            run.rows.append({"part": layer.name, "name": told(tiles), "fault": fault})
            continue
        timed(told(tiles), lambda tiles=tiles: call(layer, args, tiles))
    if layer.kind != "conv3d_fp8":  # no library has it
        timed("library", lambda: getattr(library, layer.kind)(*args))
    if layer.kind == "conv3d" and layer.taps[1] == 3:
        with_copy, without = folded(*args[:3])
        timed("cuDNN 2-D, frames in the channels", without, checked=False)
        timed("cuDNN 2-D, with the copy", with_copy, checked=not layer.residual)
    return times


def convs(
    run: Run, found: list[Layer], faults: dict[tuple[Layer, Tiles], str]
) -> dict[str, dict[str, float]]:
    best: dict[str, dict[str, float]] = {}
    for layer in found:
        if run.late(0.3 * run.options.seconds):  # the last part is for whole windows
            print(f"out of time: {layer.name}", flush=True)
            continue
        try:
            best[layer.name] = one_conv(run, layer, faults)
        except Exception as error:
            run.rows.append({"part": layer.name, "fault": f"{type(error).__name__}: {str(error)[:200]}"})
            print(f"  {run.rows[-1]['fault']}", flush=True)
    return best


def one_norm(run: Run, C: int, frames: int, H: int, W: int, copy: float) -> None:
    x, past, keep = (
        torch.randn(1, n, H, W, C, device=run.options.device).bfloat16().permute(0, 4, 1, 2, 3)
        for n in (frames, 2, 2)
    )
    gamma = torch.rand(C, 1, 1, 1, device=run.options.device).bfloat16()
    moved = 2 * C * H * W * (2 * frames + 6)
    part = f"norm_silu {C} {frames}x{H}x{W}"
    print(f"{part}  {moved / 1e9:.2f} GB, {moved / copy / 1e6:.3f} ms as a copy", flush=True)
    y = x[:, :, :, :CORNER, :CORNER].float()
    y = F.silu(y / y.norm(dim=1, keepdim=True) * C**0.5 * gamma.float())
    exact = F.pad(torch.cat((past[:, :, :, :CORNER, :CORNER].float(), y), 2), (1, 0, 1, 0))

    def check(out: Tensor) -> float:
        return ((out[..., : exact.shape[3], : exact.shape[4]].float() - exact).norm() / exact.norm()).item()

    # The history goes elsewhere, so that every launch sees the same.
    for values, warps in ((2048, 4), (4096, 4), (8192, 4), (4096, 8), (8192, 8), (2048, 2), (16384, 8)):
        config = Config(max(values // (1 << (C - 1).bit_length()), 1), warps)
        name = f"{config.block} pixels, {warps} warps"
        ours = partial(norm.norm_silu, x, gamma, past, keep, config=config)
        run.row(part, name, ours, check, bytes=moved)
    run.row(part, "library", lambda: library.norm_silu(x, gamma, past, keep), check, bytes=moved)


def norms(run: Run, copy: float) -> None:
    for C, frames, H, W in ((96, 4, 704, 1280), (192, 4, 352, 640), (384, 2, 176, 320), (384, 1, 88, 160)):
        if not run.late():
            one_norm(run, C, frames, *((H, W) if run.gpu else (8, 16)), copy)


def attention(run: Run) -> None:
    """One frame of the middle block: a head of 384 over 88x160 places."""
    L, K = (88 * 160, 384) if run.gpu else (64, 32)
    q, k, v = (torch.randn(L, 1, K, device=run.options.device).bfloat16() for _ in range(3))
    exact = torch.softmax(q[:512, 0].float() @ k[:, 0].float().T * K**-0.5, -1) @ v[:, 0].float()

    def check(y: Tensor) -> float:
        return ((y.reshape(L, K)[: len(exact)].float() - exact).norm() / exact.norm()).item()

    def products(rows: int) -> Tensor:
        parts = []
        for part in q[:, 0].split(rows):
            scores = torch.mm(part, k[:, 0].T, out_dtype=torch.float32) if run.gpu else part.float() @ k[:, 0].float().T  # fmt: skip
            parts.append(torch.softmax(scores.mul_(K**-0.5), -1).to(v.dtype) @ v[:, 0])
        return torch.cat(parts)

    print("attention 14080 x 384", flush=True)
    for name, fused in (("triton", attention_wide), ("library", memory_efficient)):
        run.row("attention", name, partial(fused, q, k, v), check, flop=4.0 * L * L * K)
    for rows in (1408, 3520, 14080):
        run.row("attention", f"products, {rows} rows", partial(products, rows), check, flop=4.0 * L * L * K)


def passes(run: Run, table: dict[tuple[int, int, int], Tiles]) -> None:
    """Windows of a whole decode and encode with random weights: seconds each, peak memory, and where they go."""
    from cosmos_fast.dispatch import use
    from cosmos_fast.vae import VAE, VAEConfig, channels_last_
    from cosmos_fast.vae_fp8 import in_8_bits

    if run.late(12):
        print("out of time: whole windows", flush=True)
        return
    H, W = (88, 160) if run.gpu else (2, 4)
    with torch.device(run.options.device):
        vae = channels_last_(VAE(VAEConfig() if run.gpu else VAEConfig.tiny()).to(torch.bfloat16))
        z, x = torch.randn(1, 16, 8, H, W), torch.rand(1, 3, 29, 8 * H, 8 * W) * 2 - 1
    vae = in_8_bits(vae) if run.options.fp8 else vae
    old = {
        "conv3d": "cudnn", "conv_half": "library", "conv_double": "library", "norm_silu": "composed",
        "attention_wide": "sdpa",
    }  # fmt: skip

    def decode(window: int) -> list[float]:
        return _lapse(run, vae.decode_stream(z, window))

    def encode(window: int) -> list[float]:
        parts = [x[:, :, :1], *x[:, :, 1:].split(window, dim=2)]
        return _lapse(run, vae.encode_stream(iter(parts)))

    plans: list[tuple[str, Callable[[int], list[float]], int, int, dict[str, str]]] = [
        ("decode, window 1", decode, 1, 4, {}), ("decode, window 2", decode, 2, 8, {}),
        ("encode, window 4", encode, 4, 4, {}), ("encode, window 8", encode, 8, 8, {}),
        ("decode, window 1, libraries", decode, 1, 4, old), ("encode, window 4, libraries", encode, 4, 4, old),
    ]  # fmt: skip
    print(*(f"  FASTEST[{key}] = {tiles}" for key, tiles in table.items()), sep="\n", flush=True)
    (FASTEST_FP8 if run.options.fp8 else FASTEST).update(table)
    plans = [plan for plan in plans if not (run.options.fp8 and plan[-1])]
    for name, go, window, frames, forced in plans:
        if run.late(6):
            print(f"out of time: {name}", flush=True)
            continue
        try:
            with use(**forced):
                one_pass(run, name, partial(go, window), frames, profiled=not forced and frames == 4)
        except Exception as error:
            run.rows.append(
                {"part": "pass", "name": name, "fault": f"{type(error).__name__}: {str(error)[:200]}"}
            )
            print(f"  {name}: {run.rows[-1]['fault']}", flush=True)


def one_pass(run: Run, name: str, go: Callable[[], list[float]], frames: int, profiled: bool) -> None:
    go()
    if run.gpu:
        torch.cuda.reset_peak_memory_stats()
    ms = median(go()[1:-1])
    peak = torch.cuda.max_memory_allocated() / 2**30 if run.gpu else 0.0
    row: dict[str, Any] = {"part": "pass", "name": name, "ms": ms, "clip_s": ms * 23e-3 * 4 / frames}
    row["peak_gib"] = peak
    run.rows.append(row)
    clip = f"{row['clip_s']:.3f} s for 92 frames, peak {peak:.2f} GiB"
    print(f"  {name:46s} {ms:8.2f} ms a window, {clip}", flush=True)
    if run.gpu and profiled and not run.late(8):
        row["kernels"] = _kernels(go)
        for kernel, spent, count in row["kernels"][:14]:
            print(f"      {spent:8.2f} ms {count:4d}x {kernel[:90]}", flush=True)


def _lapse(run: Run, parts: Iterator[Tensor]) -> list[float]:
    """Milliseconds of each window."""
    marks, stamps = [], []
    for _ in parts:
        if run.gpu:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        stamps.append(time.perf_counter() * 1e3)
    if run.gpu:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
    return [b - a for a, b in zip(stamps, stamps[1:])]


def _kernels(go: Callable[[], Any]) -> list[tuple[str, float, int]]:
    """(name, milliseconds, launches) of all kernels of a pass, longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        go()
        torch.cuda.synchronize()
    rows = [(e.key, e.self_device_time_total / 1e3, e.count) for e in seen.key_averages()]
    return sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])


def ceilings(run: Run) -> dict[str, float]:
    size = 8192 if run.gpu else 64
    a, b = (torch.randn(size, size, device=run.options.device).bfloat16() for _ in range(2))
    gemm = run.row("ceiling", f"GEMM {size}", lambda: a @ b, flop=2.0 * size**3)
    x = torch.empty(2**28 if run.gpu else 2**10, device=run.options.device, dtype=torch.bfloat16).normal_()
    y = torch.empty_like(x)
    copy = run.row("ceiling", "copy", lambda: y.copy_(x), bytes=4.0 * x.numel())
    return {
        "gemm_tflop_s": 2.0 * size**3 / (gemm or 1) / 1e9,
        "copy_gb_s": 4.0 * x.numel() / (copy or 1) / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--seconds", type=float, default=110.0, help="deadline from the start")
    parser.add_argument(
        "--only", default="", help="layers whose name contains one of these; norm, attention, pass"
    )
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="the first two tiles of each layer")
    parser.add_argument("--fp8", action="store_true", help="the convs of the recipe fp8_vae, as e4m3 codes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    options = parser.parse_args()
    run = Run(options)
    wanted = [part for part in options.only.split(",") if part]
    asked = vae_layers.in_codes(layers()) if options.fp8 else layers()
    found = [layer for layer in asked if not wanted or any(part in layer.name for part in wanted)]
    if options.device == "cpu":
        small = {704: 8, 352: 6, 176: 4, 88: 4, 1280: 16, 640: 10, 320: 8, 160: 6}
        found = [replace(layer, H=small[layer.H], W=small[layer.W], C=min(layer.C, 24)) for layer in found]
    pick = (lambda layer: choices(layer)[:2]) if options.quick else choices
    jobs = [(layer, tiles) for layer in found for tiles in pick(layer)]
    start = time.perf_counter()
    broken = (
        compiled(jobs, options.workers, options.device, start + options.seconds * 0.45)
        if options.workers
        else {}
    )
    faults = {jobs[number]: fault for number, fault in broken.items()}
    print(f"{len(jobs)} Triton choices compiled in {time.perf_counter() - start:.1f} s, {len(faults)} failed", flush=True)  # fmt: skip
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"needs a CUDA device, torch {torch.__version__} sees none.")
    if options.quick:
        faults |= {(layer, t): "not asked for" for layer in found for t in choices(layer)[2:]}
    body: dict[str, Any] = {"kind": "vae_conv_fp8" if options.fp8 else "vae_conv"}
    with torch.no_grad():
        body["ceilings"] = ceilings(run)
        for part, go in (
            ("convs", lambda: body.update(best=convs(run, found, faults))),
            ("pass", lambda: passes(run, vae_layers.fastest(found, body.get("best", {})))),
            ("norm", lambda: norms(run, body["ceilings"]["copy_gb_s"])),
            ("attention", lambda: attention(run)),
        ):
            if part == "convs" or not wanted or part in wanted:
                try:
                    go()
                except Exception as error:  # what was measured before must still be written
                    print(f"{part}: {type(error).__name__}: {error}", flush=True)
                    run.rows.append({"part": part, "fault": f"{type(error).__name__}: {str(error)[:300]}"})
        body["ceilings after"] = ceilings(run)
    body |= {
        "layers": [asdict(layer) | {"name": layer.name, "flop": layer.flop} for layer in found],
        "rows": run.rows, "seconds": time.perf_counter() - start,
        "environment": environment(options.commit),
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print("\nbest of each layer; ms of a decode window and of an encode window of four frames")
    sums = [0.0, 0.0]
    for layer in found:
        times = {k: v for k, v in body.get("best", {}).get(layer.name, {}).items() if "2-D" not in k}
        if not times:
            continue
        name = min(times, key=times.__getitem__)
        sums[0] += layer.decode * times[name]
        sums[1] += layer.encode * times[name]
        print(f"{layer.name:44s} {times[name]:8.3f} ms {layer.flop / times[name] / 1e9:5.0f} TF/s  {name}")
    print(f"sum of convs: decode {sums[0]:.2f} ms, encode {sums[1]:.2f} ms a window; {body['seconds']:.0f} s")
    return int(any("fault" in row for row in run.rows))


if __name__ == "__main__":
    sys.exit(main())
