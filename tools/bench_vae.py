"""Time, memory and error of the video VAE beside diffusers', in one process on one GPU, and from last step to mp4.

    python tools/bench_vae.py --out bench/results            everything, under 140 s on an H100
    python tools/bench_vae.py --out F.json --only main,clip
    python tools/bench_vae.py --smoke --out /tmp/f.json      the same code on a CPU, tiny sizes

Random weights of the published shape. Kernels are compiled first, in processes of their own, then diffusers is imported.
Sections: main (encode and decode of 93 frames at 704 x 1280), peers (diffusers' AutoencoderKLWan, stock and channels last,
ours once more between them), accuracy (fp32 and bf16 beside diffusers'), clip (a clip through the engine, from its last
denoising step to the finished mp4, of a real clip's frames and of noise), stages (each against its FLOP at the GEMM rate),
fp8 (the recipe's 8-bit convs), encoder (x264 alone), windows (time and memory by window, and in strips for small cards),
strips (equal to the whole picture), embedded (8 bits on real weights, which compiles kernels for half a minute). The file
is rewritten after every section; one that fails, as peers do when one of them did not run, does not stop the next, and
none starts after the deadline. GiB of a call count weights, not its input.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools"), str(ROOT)]

from published import relative_l2  # noqa: E402
from records import destination, environment  # noqa: E402
from vae import PARTS, Diffusers, VAEBench, build, compile_kernels, import_peer, stages, timed_stages  # noqa: E402
from vae_clip import clip, encoder  # noqa: E402

from cosmos_fast import embedded, ops, testing, vae_fp8, vae_strips  # noqa: E402
from cosmos_fast.vae import VAEConfig, flops  # noqa: E402
from cosmos_fast.vae_rows import strip_flops, strip_memory  # noqa: E402

SECTIONS = ("main", "peers", "accuracy", "clip", "stages", "fp8", "encoder", "windows", "strips", "embedded")
PEERS = {"diffusers": False, "diffusers_channels_last": True}
STRIPS = 4

# --- sections --------------------------------------------------------------------------------------


def main_case(b: VAEBench) -> None:
    """Encode and decode of the main clip, in turns. A short clip warms up: windows have one shape."""
    x, z = b.clip(), b.latent()
    calls = {"ours_encode": lambda: b.vae.encode(x, 4), "ours_decode": b.decode_all(z, 1)}
    first = {
        "ours_encode": b.timed(lambda: b.vae.encode(x[:, :, :9], 4)),
        "ours_decode": b.timed(b.decode_all(z[:, :, :3], 1)),
    }
    b.record["cases"]["720"] = case = {
        "size": b.size, "flop": flops(b.config, *b.size), "first_call_s": first, "variants": {},
    }  # fmt: skip
    memory = {name: b.measured(call) for name, call in calls.items()}
    for name, row in b.interleave(calls, b.args.rounds, "main", settle_s=1.0).items():
        case["variants"][name] = whole_row(b, name, row, memory[name])


def whole_row(b: VAEBench, name: str, row: dict[str, Any], memory: dict[str, float]) -> dict[str, Any]:
    part = PARTS.index(name.rpartition("_")[2])
    held = {key: memory[key] for key in ("resident_gib", "peak_gib") if key in memory}
    return b.row(row, flops(b.config, *b.size)[part], held)


def peers(b: VAEBench) -> None:
    """The same clip by diffusers; ours once more before each: the peers are timed at the clocks that they leave."""
    x, z = b.clip(), b.latent()
    case = b.record["cases"].setdefault("720", {"size": b.size, "variants": {}})
    ours = {"ours_encode": lambda: b.vae.encode(x, 4), "ours_decode": b.decode_all(z, 1)}
    for name, is_last in PEERS.items():
        peer = None
        try:
            peer = Diffusers(b.config, b.state, torch.bfloat16, is_last)
            peer.encode(x[:, :, :9]), peer.decode(z[:, :, :3])
            for key, call in ours.items():
                seconds = b.timed(call)
                if key in case["variants"]:
                    case["variants"][key].setdefault("runs_beside_peers_s", []).append(seconds)
            for part, call in (
                ("encode", lambda p=peer: p.encode(x)),
                ("decode", lambda p=peer: p.decode(z)),
            ):
                key = f"{name}_{part}"
                with b.watch(key):
                    found = b.measured(call)
                row = {
                    "median_s": found["seconds"],
                    "runs_s": [found["seconds"]],
                    "gpu": b.watch.summary(key),
                }
                case["variants"][key] = whole_row(b, key, row, found)
        except Exception as error:  # one peer that does not run must not lose the other
            case.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:500]
            traceback.print_exc()
        del peer
        b.clear()
    if failed := case.get("failed"):
        raise RuntimeError(f"no times of {', '.join(failed)}: {next(iter(failed.values()))}")


def by_stage(b: VAEBench) -> None:
    """Seconds of every stage of a whole encode and decode, and their floor: FLOP at the measured GEMM rate."""
    if b.device.type != "cuda":
        return
    x, z = b.clip(), b.latent()
    calls = {"encode": lambda: b.vae.encode(x, 4), "decode": b.decode_all(z, 1)}
    b.record["stages"] = {}
    for part, call in calls.items():
        found = stages(b.vae, part, b.size)
        call()
        with timed_stages(found) as marks:
            seconds = b.timed(call)
        rows: dict[str, Any] = {}
        for name, (_, flop) in found.items():
            spent = sum(start.elapsed_time(end) for start, end in marks[name]) / 1e3
            rows[name] = {"seconds": spent, "tflop": flop / 1e12, "tflop_s": flop / spent / 1e12}
            if b.peaks is not None:
                rows[name]["floor_share"] = flop / (b.peaks.bf16_tflop_s * 1e12) / spent
        rest = seconds - sum(row["seconds"] for row in rows.values())
        b.record["stages"][part] = {"seconds": seconds, "rest_s": rest, "rows": rows}


def windows(b: VAEBench) -> None:
    """Time and memory of one call by window, and in strips."""
    x, z = b.clip(), b.latent()
    frames, height, width = b.size

    def read(start: int, stop: int, top: int, end: int) -> Tensor:
        return x[:, :, start:stop, top:end]

    def in_strips() -> None:
        for tile in vae_strips.decode(b.vae, z, 1, STRIPS):
            del tile

    calls: dict[str, Callable[[], Any]] = {
        f"decode, {STRIPS} strips": in_strips,
        f"encode, {STRIPS} strips": lambda: vae_strips.encode(
            b.vae, read, (frames, height, width), 4, STRIPS
        ),
    }
    calls |= {f"decode, window {n}": b.decode_all(z, n) for n in (1, 2, 4)}
    calls |= {f"encode, window {n}": lambda n=n: b.vae.encode(x, n) for n in (4, 8, 16)}
    b.record["windows"] = rows = {}
    share = {  # arithmetic in strips over that of the whole picture
        part: 1 + (strip_flops(*b.size, STRIPS, b.config)[i] - strip_flops(*b.size, 1, b.config)[i]) / flops(b.config, *b.size)[i]
        for i, part in enumerate(PARTS)
    }  # fmt: skip
    for name, call in calls.items():
        if b.is_late():
            return
        try:
            with b.watch(f"windows/{name}"):
                found = b.measured(call)
        except torch.OutOfMemoryError as error:
            rows[name] = {"error": str(error)[:200]}
            b.clear()
            continue
        part = name[:6]
        rows[name] = found | {"gpu": b.watch.summary(f"windows/{name}")}
        if "peak_gib" in found:
            rows[name]["call_gib"] = found["peak_gib"] - found["resident_gib"]
        if "strips" in name:
            told = strip_memory(height, width, 4, 1, STRIPS, b.config)[PARTS.index(part)]
            rows[name] |= {"flop_over_whole": share[part], "told_gib": 2 * told / 2**30}
        print(f"  {name:<22}{found['seconds']:8.3f} s  {rows[name].get('call_gib', 0):6.2f} GiB", flush=True)


def in_fp8(b: VAEBench) -> None:
    """The 8-bit convs: time and memory of the clip, and PSNR of frames to those of 16 bits."""
    vae_fp8.prove(b.device)
    x, z = b.clip(), b.latent()
    vae = vae_fp8.in_8_bits(build(b.config, b.state, torch.bfloat16))
    calls: dict[str, Callable[[], Any]] = {
        "decode": b.decode_all(z, 1, vae), "encode": lambda: vae.encode(x, 4)
    }  # fmt: skip
    b.record["fp8"] = found = {"rows": {}}
    short = z[:, :, :3], x[:, :, :9]
    first = {
        "decode": b.timed(lambda: vae.decode(short[0], 1)),
        "encode": b.timed(lambda: vae.encode(short[1], 4)),
    }
    for part, call in calls.items():
        rows = [b.measured(call) for _ in range(2)]
        best = min(rows, key=lambda row: row["seconds"])
        rate = flops(b.config, *b.size)[PARTS.index(part)] / best["seconds"] / 1e12
        found["rows"][part] = best | {"first_call_s": first[part], "tflop_s": rate}
        if "peak_gib" in best:
            found["rows"][part]["call_gib"] = best["peak_gib"] - best["resident_gib"]
        print(f"  fp8 {part}  {best['seconds']:.3f} s  {found['rows'][part].get('call_gib', 0):.2f} GiB  first {first[part]:.1f} s", flush=True)  # fmt: skip
    small = b.latent(b.small)
    found["random_weights_psnr_db"] = psnr(vae.decode(small, 1), b.vae.decode(small, 1))


def in_embedded(b: VAEBench) -> None:
    """PSNR of frames in 8 and 16 bits by the model inside the package: weights drawn at random keep no error small."""
    state = {name: weight.to(b.device) for name, weight in embedded.vae_state().items()}
    config = VAEConfig(base=state["encoder.conv1.weight"].shape[0])
    whole = b.clip(b.small)
    exact, plain = build(config, state, torch.float32), build(config, state, torch.bfloat16)
    codes = vae_fp8.in_8_bits(build(config, state, torch.bfloat16))
    latents = plain.encode(whole, 4)
    frames = {
        name: one.decode(latents, 1) for name, one in (("fp32", exact), ("bf16", plain), ("fp8", codes))
    }
    b.record["embedded"] = {
        "size": b.small, "bf16_to_fp32_db": psnr(frames["bf16"], frames["fp32"]), "fp8_to_fp32_db": psnr(frames["fp8"], frames["fp32"]),
        "bf16_to_clip_db": psnr(frames["bf16"], whole), "fp8_to_clip_db": psnr(frames["fp8"], whole),
        "latents_relative_l2": relative_l2(codes.encode(whole, 4), latents),
    }  # fmt: skip
    print(f"  {b.record['embedded']}", flush=True)


def psnr(x: Tensor, y: Tensor) -> float:
    """Of frames in [-1, 1], in dB."""
    square = (x.float().clamp(-1, 1) - y.float().clamp(-1, 1)).square().mean()
    return float(10 * torch.log10(4 / square))


def accuracy(b: VAEBench) -> None:
    """fp32 of ours against diffusers', by window; bf16 of both against diffusers' fp32."""
    low_x, low_z = b.clip(b.small), b.latent(b.small)
    x, z = low_x.float(), low_z.float()  # the same numbers: rounding of the input is no one's error
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        peer = Diffusers(b.config, b.state, torch.float32, False)
        exact = {"encode": peer.encode(x), "decode": peer.decode(z)}
        del peer
        ours = build(b.config, b.state, torch.float32)
        found: dict[str, Any] = {"fp32_max_difference": {}, "bf16_relative_l2": {}}
        for window in (1, 4, 16, None):
            frames = None if window is None else 4 * window
            for part, y in (
                ("encode", ours.encode(x, frames)),
                ("decode", ours.decode(z, window).clamp_(-1, 1)),
            ):
                found["fp32_max_difference"][f"{part}, window {window or 'whole'}"] = float(
                    (y - exact[part]).abs().max()
                )
        del ours
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept
    b.clear()
    peer = Diffusers(b.config, b.state, torch.bfloat16, False)
    for name, encode, decode in (
        ("ours", lambda: b.vae.encode(low_x, 4), lambda: b.vae.decode(low_z, 1).clamp_(-1, 1)),
        ("diffusers", lambda: peer.encode(low_x), lambda: peer.decode(low_z)),
    ):
        for part, call in (("encode", encode), ("decode", decode)):
            found["bf16_relative_l2"][f"{name}_{part}"] = relative_l2(call(), exact[part])
    errors = found["bf16_relative_l2"]
    found |= {
        f"ours_over_diffusers_{part}": errors[f"ours_{part}"] / errors[f"diffusers_{part}"] for part in PARTS
    }
    b.record["accuracy"] = {"size": b.small} | found


def in_strips(b: VAEBench) -> None:
    """What strips differ from the whole picture in: the order of sums at most. Also as codes of the finished picture."""
    size = (5, *b.size[1:])
    x, z = b.clip(size), b.latent(size)
    whole = b.vae.decode(z, 1)
    found = torch.full_like(whole, torch.nan)
    for frame, row, tile in vae_strips.decode(b.vae, z, 1, STRIPS):
        found[:, :, frame : frame + tile.shape[2], row : row + tile.shape[3]] = tile
    latent = b.vae.encode(x, 4)
    cut = vae_strips.encode(
        b.vae, lambda start, stop, top, end: x[:, :, start:stop, top:end], size, 4, STRIPS
    )
    codes = (ops.pixels(found).int() - ops.pixels(whole).int()).abs()
    b.record["strips"] = {
        "size": size, "count": STRIPS, "decode_bitwise": bool(torch.equal(found, whole)),
        "decode_relative_l2": relative_l2(found, whole), "encode_bitwise": bool(torch.equal(cut, latent)),
        "encode_relative_l2": relative_l2(cut, latent), "codes_off_most": int(codes.max()),
        "codes_off_share": float((codes > 0).float().mean()),
    }  # fmt: skip


# --- running them ----------------------------------------------------------------------------------


def summary(record: dict[str, Any]) -> str:
    lines = [
        f"{row['op']}={row['chosen']}"
        for row in record.get("ops", [])
        if row["op"] in ("conv3d", "conv_half", "conv_double", "norm_silu", "attention_wide", "pixels")
    ]
    for name, row in record["cases"].get("720", {}).get("variants", {}).items():
        clock = row["gpu"].get("sm_mhz", {}).get("median", 0)
        lines.append(
            f"{name:<32}{row['median_s']:8.3f} s  {row['tflop_s']:6.1f} TFLOP/s  {row.get('gemm_peak_pct', 0):5.1f} % of GEMM  "
            f"{row.get('own_peak_gib', 0):6.2f} GiB  {clock:.0f} MHz"
        )
    for part, one in record.get("stages", {}).items():
        for name, row in one["rows"].items():
            lines.append(
                f"{part} {name:<22}{1e3 * row['seconds']:8.1f} ms  {row['tflop_s']:6.1f} TFLOP/s  {100 * row.get('floor_share', 0):5.1f} %"
            )
        lines.append(f"{part} {'rest':<22}{1e3 * one['rest_s']:8.1f} ms of {1e3 * one['seconds']:.1f}")
    for name in ("fp8", "accuracy", "strips", "clip", "encoder", "embedded"):
        if name in record:
            lines.append(f"{name} {json.dumps(record[name])[:1500]}")
    for name, section in record["sections"].items():
        lines.append(
            f"section {name:<10}{section['status']:<8}{section['seconds']:7.1f} s {section.get('error', '')[-300:]}"
        )
    return "\n".join(lines)


def goals(record: dict[str, Any]) -> str:
    rows, slim = record["cases"].get("720", {}).get("variants", {}), record.get("windows", {})
    found = record.get("accuracy", {})
    values = [
        ("encode s", rows.get("ours_encode", {}).get("median_s"), 1.1),
        ("decode s", rows.get("ours_decode", {}).get("median_s"), 1.8),
        ("decode peak GiB", rows.get("ours_decode", {}).get("own_peak_gib"), 6.0),
        (
            f"decode peak GiB in {STRIPS} strips",
            None
            if (held := slim.get(f"decode, {STRIPS} strips", {}).get("call_gib")) is None
            else held + record["weights_gib"],
            3.0,
        ),
        ("fp32 difference", max(found.get("fp32_max_difference", {}).values(), default=None), 2e-5),
        ("bf16 encode error over diffusers", found.get("ours_over_diffusers_encode"), 1.2),
        ("bf16 decode error over diffusers", found.get("ours_over_diffusers_decode"), 1.2),
        ("last step to mp4 s", record.get("clip", {}).get("last_step_to_mp4_s"), 2.5),
    ]
    for part in PARTS:
        for name in PEERS:
            theirs, ours = (rows.get(f"{who}_{part}", {}).get("median_s") for who in (name, "ours"))
            values.append((f"{part} time over {name}", theirs and ours and ours / theirs, 1 / 3))
    return "\n".join(
        f"goal {name:<36}{value:12.6f} <= {limit:<6} {'met' if value <= limit else 'MISSED'}"
        for name, value, limit in values
        if value is not None
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a .json file, or the folder bench/results")
    parser.add_argument("--only", help=f"comma-separated sections of {', '.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=12, help="processes that compile kernels; 0: none")
    parser.add_argument(
        "--clip",
        type=Path,
        default=ROOT / "examples" / "clips" / "table.mp4",
        help="a real clip for what the mp4 shows",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: for what needs no GPU, such as embedded",
    )
    parser.add_argument("--deadline-s", type=float, default=125, help="start no section after this")
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: checks this script")
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else list(SECTIONS)
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only: sections are {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    testing.kernels_from_checkout()
    ready = compile_kernels(args)  # forks: diffusers may ask the GPU something when it is imported
    no_peer = import_peer() if {"peers", "accuracy"} & set(wanted) else None
    if no_peer is not None:
        print(
            f"NO PEER: diffusers' VAE cannot be imported, so nothing is compared with it: {no_peer}",
            flush=True,
        )
    b = VAEBench(args, environment(args.commit))
    b.record["compile"], b.record["no_peer"] = ready, no_peer
    path = destination(args.out, b.record["environment"], "vae")

    steps: dict[str, Callable[[VAEBench], None]] = {
        "main": main_case, "stages": by_stage, "windows": windows, "peers": peers, "accuracy": accuracy,
        "clip": clip, "fp8": in_fp8, "strips": in_strips, "encoder": encoder, "embedded": in_embedded,
    }  # fmt: skip

    section = partial(b.section, path=path)
    section("build", b.build)
    section("peaks", b.measure_peaks)
    for name in wanted:
        section(name, lambda name=name: steps[name](b))
    b.watch.close()
    print(f"\n{summary(b.record)}\n{goals(b.record)}\nwritten: {path}")
    return int(any(s["status"] != "ok" for s in b.record["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
