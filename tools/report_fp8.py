"""What tools/report.py says of 8-bit linear layers and calls: the `linears` and `call` of records of tools/bench_fp8.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

RECIPES = {
    "exact": "ours, exact", "fp8_linear": "ours, linear layers in 8 bits", "fp8": "ours, linear layers and attention in 8 bits",
    "fp8_te": "ours, linear layers of Transformer Engine", "diffusers_compiled": "diffusers, blocks compiled",
}  # fmt: skip
PARTS = {
    "block": "block without attention", "fc1": "first layer of the MLP with GELU", "qkv": "packed projection",
    "out": "output projection", "fc2": "second layer of the MLP", "rounding": "what makes and rounds rows",
}  # fmt: skip
TE = ("te, current scaling", "te, delayed scaling")
Table = tuple[list[str], list[list[str]]]


def call_table(call: Mapping[str, Any]) -> Table:
    """(head, rows) of whole calls by recipe."""
    times = call["variants"]
    peer = times.get("diffusers_compiled", {}).get("median_s")
    rows = []
    for name, title in RECIPES.items():
        if name in times:
            seconds, about = times[name]["median_s"], call["recipes"][name]
            speed = "–" if peer is None else f"{peer / seconds:.2f}"
            cells = (about.get("weights_gib"), about.get("own_peak_gib"))
            error = about.get("relative_l2_to_exact")
            rows.append([
                title, f"{seconds:.3f}", f"{times[name]['iqr_s']:.3f}", speed,
                *("–" if x is None else f"{x:.2f}" for x in cells), "–" if not error else f"{error:.2e}",
            ])  # fmt: skip
    head = ["one call, 93 frames, 720p", "s", "IQR s", "speed over compiled diffusers", "weights GiB", "peak GiB",
            "relative L2 to exact"]  # fmt: skip
    return head, rows


def linear_table(linears: Mapping[str, Any]) -> Table:
    """(head, rows) of every way of every part that ran; the tiles of our kernel by their best alone."""
    rows = []
    for part, title in PARTS.items():
        ways = {way: row for way, row in linears.get(part, {}).items() if "ms" in row}
        tiles = sorted((row["ms"], way) for way, row in ways.items() if way.startswith("fp8 triton"))
        for way, row in ways.items():
            if way.startswith("fp8 triton") and way != tiles[0][1]:
                continue
            rate, error = row.get("tflop_s"), row.get("relative_l2")
            rows.append([
                f"{title}, {way}", f"{row['ms']:.3f}", "–" if not rate else f"{rate:.0f}", "–" if not error else f"{error:.2e}",
            ])  # fmt: skip
    return ["at 84,480 tokens", "ms", "TFLOP/s", "relative L2"], rows


def figures(
    call: Mapping[str, Any] | None, linears: Mapping[str, Any] | None
) -> Iterator[tuple[str, float, str, dict[str, float]]]:
    """(key, value, unit, peers): denoiser_call_s.fp8, .fp8_linear, denoiser_weights_gib.fp8, ..., linears_ms.fp8."""
    times = {} if call is None else {name: row["median_s"] for name, row in call["variants"].items()}
    for name in ("fp8", "fp8_linear"):
        if call is not None and name in times:
            about = call["recipes"][name]
            peers = {p: times[p] for p in ("exact", "diffusers_compiled") if p in times}
            yield f"denoiser_call_s.{name}", times[name], "s", peers
            yield f"call_error_to_exact.{name}", about["relative_l2_to_exact"], "1", {}
            for key, figure in (
                ("weights_gib", "denoiser_weights_gib"),
                ("own_peak_gib", "denoiser_peak_gib"),
            ):
                if key in about:
                    exact = call["recipes"].get("exact", {})
                    yield f"{figure}.{name}", about[key], "GiB", {"exact": exact[key]} if key in exact else {}
    ways = {way: row["ms"] for way, row in (linears or {}).get("block", {}).items() if "ms" in row}
    ours = [ms for way, ms in ways.items() if way.startswith("fp8")]
    if ours:
        peers = {way: ways[way] for way in ("bf16", *TE) if way in ways}
        yield "linears_ms.fp8", min(ours), "ms", peers
