"""What tools/report.py says of our 8-bit attention kernel: records of tools/bench_attention8.py, and calls that run with it.

attention_fp8_tflops.own         TFLOP/s at the published size over seconds without a break, libraries beside it
attention_fp8_tflops.own_burst   the same in runs of less than a second, at a higher clock; records of ours alone do not count
attention_fp8_error.own          relative error on activations of the embedded model, against fp64
attention_fp8_sparse.N           time at N % of the key tiles over N % of the dense time
denoiser_call_s.fp8_own          one call of the denoiser in 8 bits, its attention ours
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Figure = tuple[str, float, str, str, dict[str, float]]


def _rows(record: Mapping[str, Any], section: str) -> list[dict[str, Any]]:
    return [row for row in record.get("records", ()) if row.get("section") == section]


def _long(record: Mapping[str, Any]) -> dict[str, float]:
    return {row["name"]: row["tflops"] for row in _rows(record, "sustained") if "tflops" in row}


def _burst(record: Mapping[str, Any]) -> dict[str, float]:
    """By name: dense rungs that are right and leave nothing out as "own NAME", libraries as themselves."""
    whole = {
        rung["name"]
        for rung in record.get("rungs", ())
        if rung.get("probe", "None") == "None" and not rung.get("sparse")
    }
    rows = [row for row in record.get("records", ()) if "tflops" in row and "section" not in row]
    wrong = {row["rung"] for row in record.get("records", ()) if row.get("check") and not row["ok"]}
    ours = {f"own {row['rung']}": row["tflops"] for row in rows if row.get("rung") in whole - wrong}
    return ours | {row["peer"].replace("_", " "): row["tflops"] for row in rows if "peer" in row}


def figures(results: Any) -> Iterator[Figure]:
    """(key, value, unit, file, peers), each from the newest record that has it."""
    for key, rates_of in (("own", _long), ("own_burst", _burst)):

        def found_in(record: Mapping[str, Any], rates_of: Any = rates_of) -> dict[str, float] | None:
            rates: dict[str, float] = rates_of(record) if record.get("kind") == "attention8" else {}
            return rates if len({name.startswith("own ") for name in rates}) == 2 else None

        if (found := results.newest(found_in)) is not None:
            file, _, rates = found
            best = max(rate for name, rate in rates.items() if name.startswith("own "))
            peers = {name: rate for name, rate in rates.items() if not name.startswith("own ")}
            yield f"attention_fp8_tflops.{key}", best, "TFLOP/s", file, peers
    if (found := results.newest(lambda r: r.get("kind") == "attention8" and [row for row in _rows(r, "activations") if "mean" in row])) is not None:  # fmt: skip
        means = dict(found[2][0]["mean"])
        yield "attention_fp8_error.own", means.pop("own"), "1", found[0], means
    if (found := results.newest(lambda r: r.get("kind") == "attention8" and [row for row in _rows(r, "sparse") if row.get("ascending") and "ms" in row])) is not None:  # fmt: skip
        for row in found[2]:
            name = row["name"].rstrip("%")
            yield f"attention_fp8_sparse.{name}", row["over_proportional"], "x", found[0], {}
    yield from _call(results)


def _call(results: Any) -> Iterator[Figure]:
    """From the recipe whose attention was ours, whether as the first choice or forced."""

    def ours(record: Mapping[str, Any]) -> str | None:
        call = record.get("call") if record.get("kind") == "fp8" else None
        if not call:
            return None
        rows = call["recipes"]
        names = [n for n in ("fp8", "fp8_own") if rows.get(n, {}).get("attention") == "own" and n in call["variants"]]  # fmt: skip
        return names[0] if names else None

    if (found := results.newest(ours)) is not None:
        file, record, name = found
        times = {n: row["median_s"] for n, row in record["call"]["variants"].items()}
        others = ("exact", "fp8_linear", "fp8_fa3", "fp8_cudnn", "diffusers_compiled")
        yield "denoiser_call_s.fp8_own", times[name], "s", file, {n: times[n] for n in others if n in times}
