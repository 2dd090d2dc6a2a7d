"""What tools/report.py says of 8-bit layers and calls: `call`, `te_call`, `linears`, `budget` of records of tools/bench_fp8.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

RECIPES = {
    "exact": "ours, exact", "fp8_linear": "ours, linear layers in 8 bits", "fp8": "ours, linear layers and attention in 8 bits",
    "fp8_own": "the same, our attention kernel", "fp8_fa3": "the same, FlashAttention-3", "fp8_cudnn": "the same, cuDNN",
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


def budget_table(budget: Mapping[str, Any]) -> Table:
    """(head, rows): how far a velocity is from the exact one with one kind of layer in 8 bits; columns are steps."""
    found = {name: row for name, row in budget["relative_l2"].items() if row}
    steps = sorted({step for row in found.values() for step in row}, key=int)
    rows = [[name, *(f"{row[s]:.2e}" if s in row else "–" for s in steps)] for name, row in found.items()]
    return ["in 8 bits, relative L2 of a call", *(f"step {s}" for s in steps)], rows


CALLS, PLACES = ("call", "te_call"), {"linears": linear_table, "budget": budget_table}


def calls(results: Any) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(file, record, its calls), newest first, of those that have a way which no newer one has."""
    seen: set[str] = set()
    for file, record in results.files:
        for place in CALLS if record.get("kind") == "fp8" else ():
            call = record.get(place) or {}
            new = set(call.get("variants", ())) - seen
            if new:
                seen |= new
                yield file, record, call


def shown(results: Any, table: Callable[..., str], note: Callable[..., str]) -> str | None:
    """The newest of each, with its file; of calls whole runs, for times are only compared within one."""
    found = [(call_table, one) for one in calls(results)]
    found += [(make, one) for key, make in PLACES.items() if (one := results.own(key, "fp8")) is not None]
    parts = (f"{table(*make(part))}\n\n{note(file, record)}" for make, (file, record, part) in found)
    return "\n\n".join(parts) or None


def figures(results: Any) -> Iterator[tuple[str, float, str, str, dict[str, float]]]:
    """(key, value, unit, file, peers): denoiser_call_s.fp8, .fp8_linear, .fp8_te, denoiser_weights_gib.fp8, ..., linears_ms.fp8."""
    for file, _, call in reversed(list(calls(results))):  # a newer one counts where both have a recipe
        yield from _of_calls(file, call)
    if (found := results.own("linears", "fp8")) is not None:
        ways = {way: row["ms"] for way, row in found[2].get("block", {}).items() if "ms" in row}
        if ours := [ms for way, ms in ways.items() if way.startswith("fp8")]:
            peers = {way: ways[way] for way in ("bf16", *TE) if way in ways}
            yield "linears_ms.fp8", min(ours), "ms", found[0], peers


def _of_calls(file: str, call: Mapping[str, Any]) -> Iterator[tuple[str, float, str, str, dict[str, float]]]:
    times = {name: row["median_s"] for name, row in call["variants"].items()}
    exact = call["recipes"].get("exact", {})
    for name in ("fp8", "fp8_linear", "fp8_te"):
        if name in times:
            about = call["recipes"][name]
            peers = {p: times[p] for p in ("exact", "diffusers_compiled") if p in times}
            yield f"denoiser_call_s.{name}", times[name], "s", file, peers
            yield f"call_error_to_exact.{name}", about["relative_l2_to_exact"], "1", file, {}
            for key, title in (
                ("weights_gib", "denoiser_weights_gib"),
                ("own_peak_gib", "denoiser_peak_gib"),
            ):
                if key in about:
                    yield (
                        f"{title}.{name}",
                        about[key],
                        "GiB",
                        file,
                        {"exact": exact[key]} if key in exact else {},
                    )
        if name in call.get("kernels", {}):
            yield f"rounding_share.{name}", call["kernels"][name]["rounding_share"], "1", file, {}
