"""tools/report_attention8.py: figures of our 8-bit attention kernel, each from the newest record that has it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools")]

import report  # noqa: E402

BURST = {
    "kind": "attention8", "rungs": [
        {"name": "a", "probe": "None", "sparse": False}, {"name": "b", "probe": "None", "sparse": False},
        {"name": "listed", "probe": "None", "sparse": True}, {"name": "less", "probe": "NoMaxima", "sparse": False},
    ],
    "records": [
        {"rung": "a", "check": "exact", "ok": True}, {"rung": "b", "check": "exact", "ok": False},
        {"rung": "a", "share": 1.0, "tflops": 1030.0}, {"rung": "b", "share": 1.0, "tflops": 1400.0},
        {"rung": "less", "share": 1.0, "tflops": 1500.0}, {"rung": "listed", "share": 0.5, "tflops": 2000.0},
        {"peer": "fa3_fp8", "tflops": 950.0}, {"peer": "cudnn_fp8", "missing": "none"},
    ],
}  # fmt: skip
LONG = {
    "kind": "attention8", "rungs": [],
    "records": [
        {"section": "sustained", "name": "own a", "tflops": 1010.0}, {"section": "sustained", "name": "own c", "tflops": 1110.0},
        {"section": "sustained", "name": "fa3 fp8", "tflops": 940.0}, {"section": "sustained", "name": "took", "seconds": 30},
        {"section": "activations", "name": "edge", "mean": {"bf16": 0.002, "own": 0.022, "fa3": 0.023}},
        {"section": "sparse", "name": "35%", "ascending": True, "ms": 20.0, "over_proportional": 1.05, "ok": True},
        {"section": "sparse", "name": "35%", "ascending": False, "ms": 22.0, "over_proportional": 1.15, "ok": False},
    ],
}  # fmt: skip


def call(attention: str, **times: float) -> dict[str, Any]:
    rows: dict[str, Any] = {name: {} for name in times} | {"fp8": {"attention": attention}}
    if "fp8_own" in times:
        rows["fp8_own"] = {"attention": "own"}
    return {
        "kind": "fp8",
        "call": {"recipes": rows, "variants": {n: {"median_s": s} for n, s in times.items()}},
    }


def figures(tmp_path: Path, *records: dict[str, Any]) -> dict[str, Any]:
    """Of records from old to new."""
    from report_attention8 import figures as found_in

    folder = tmp_path / "gpu"
    folder.mkdir(exist_ok=True)
    for i, record in enumerate(records):
        (folder / f"{i}.json").write_text(
            json.dumps({"environment": {"date": f"2026-01-0{i + 1}"}, **record})
        )
    (results,) = report.load(tmp_path)
    return {key: (value, file.rpartition("/")[2], peers) for key, value, _, file, peers in found_in(results)}


def test_a_burst_is_not_called_sustained(tmp_path: Path) -> None:
    assert figures(tmp_path, BURST) == {
        "attention_fp8_tflops.own_burst": (1030.0, "0.json", {"fa3 fp8": 950.0})
    }


def test_a_record_without_a_library_does_not_hide_one_that_compares(tmp_path: Path) -> None:
    alone = BURST | {"records": [row for row in BURST["records"] if "peer" not in row]}
    assert figures(tmp_path, BURST, alone)["attention_fp8_tflops.own_burst"][1] == "0.json"


def test_each_figure_comes_from_the_newest_record_that_has_it(tmp_path: Path) -> None:
    found = figures(tmp_path, LONG, BURST)
    assert found["attention_fp8_tflops.own"] == (1110.0, "0.json", {"fa3 fp8": 940.0})
    assert found["attention_fp8_tflops.own_burst"][1] == "1.json"
    assert found["attention_fp8_error.own"] == (0.022, "0.json", {"bf16": 0.002, "fa3": 0.023})
    assert found["attention_fp8_sparse.35"] == (1.05, "0.json", {})


def test_the_call_is_that_whose_attention_was_ours(tmp_path: Path) -> None:
    chosen = call("own", exact=3.2, fp8=2.0, fp8_fa3=2.2)
    assert figures(tmp_path, chosen)["denoiser_call_s.fp8_own"] == (
        2.0,
        "0.json",
        {"exact": 3.2, "fp8_fa3": 2.2},
    )
    forced = call("fa3", exact=3.2, fp8=2.2, fp8_own=2.1)
    assert figures(tmp_path, chosen, forced)["denoiser_call_s.fp8_own"] == (2.1, "1.json", {"exact": 3.2})
    other = call("fa3", exact=3.2, fp8=2.2)
    assert figures(tmp_path, chosen, other)["denoiser_call_s.fp8_own"][1] == "0.json"
    (tmp_path / "gpu" / "0.json").unlink()
    assert "denoiser_call_s.fp8_own" not in figures(tmp_path, other)


def test_they_are_among_the_headline_figures(tmp_path: Path) -> None:
    figures(tmp_path, LONG, call("own", exact=3.2, fp8=2.0) | {"call": call("own", exact=3.2, fp8=2.0)["call"] | {
        "recipes": {"exact": {}, "fp8": {"attention": "own", "relative_l2_to_exact": 0.05}}}})  # fmt: skip
    found = report.figures(report.load(tmp_path))
    assert found["attention_fp8_tflops.own"]["unit"] == "TFLOP/s"
    assert found["denoiser_call_s.fp8_own"] == {
        "value": 2.0, "unit": "s", "file": "bench/results/gpu/1.json", "peer": {"exact": 3.2},
    }  # fmt: skip
