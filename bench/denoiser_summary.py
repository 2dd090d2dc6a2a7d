"""What tools/bench_denoiser.py prints at its end: the record in lines, and the main case against what was set out to reach."""

from __future__ import annotations

from typing import Any


def summary(record: dict[str, Any]) -> str:
    lines = ["ops: " + ", ".join(f"{row['op']}={row['chosen']}" for row in record.get("ops", []))]
    for name, one in record["cases"].items():
        lines.append(f"{name} {one['grid']} prepare {one.get('prepare_s', 0):.3f} s")
        for key, row in one.get("variants", {}).items():
            clock = row["gpu"].get("sm_mhz", {}).get("median", 0)
            lines.append(
                f"  {key:<20}{row['median_s']:9.4f} s  iqr {row['iqr_s']:.4f}  {row['tflop_s']:6.1f} TFLOP/s  "
                f"peak {row.get('own_peak_gib', 0):5.2f} GiB  first {one['first_call_s'].get(key, 0):6.2f} s  {clock:.0f} MHz"
            )
        if "graph" in one:
            lines.append(f"  graph {one['graph']}")
    for name, row in record.get("waterfall", {}).items():
        lines.append(f"waterfall {name:<12}{row.get('per_call_s', row['median_s']):9.4f} s per call")
    for name, row in record.get("trace", {}).items():
        classes = {k: round(v, 1) for k, v in row["classes_ms"].items()}
        lines.append(
            f"trace {name:<20} other {100 * row['other_share']:.2f} % of {row['span_ms']:.1f} ms {classes}"
        )
    for name in ("accuracy", "block"):
        if name in record:
            lines.append(f"{name} {record[name]}")
    for name, one in record.get("first", {}).items():
        told = ", ".join(
            f"{key} {one[key]:.2f}" for key in ("import", "first_call", "call", "compile", "process")
        )
        lines.append(f"first {name:<6}{told} s")
    for name, one in record.get("composed_job", {}).get("rows", {}).items():
        lines.append(
            f"composed, not run: {name} {one['denoise_s']:.1f} s denoising, {one.get('seconds', 0):.1f} s with the VAE"
        )
    for one in (record[key] for key in ("job", "short_job") if key in record):
        lines.append(
            f"job {one['steps']} steps {one['seconds']:.2f} s, peak {one['peak_gib']}, std {one['latent_std']:.3f}"
        )
    for name, section in record["sections"].items():
        lines.append(
            f"section {name:<10}{section['status']:<8}{section['seconds']:7.1f} s {section.get('error', '')[-300:]}"
        )
    return "\n".join(lines)


def goals(record: dict[str, Any]) -> str:
    """The main case against what was set out to reach."""
    rows, found = record["cases"].get("720", {}).get("variants", {}), record.get("trace", {}).get("ours", {})
    values = [
        ("call s", rows.get("ours", {}).get("median_s"), 3.2),
        ("pair s", rows.get("ours_pair", {}).get("median_s"), 6.2),
        ("pair peak GiB", rows.get("ours_pair", {}).get("own_peak_gib"), 12.0),
        ("share outside attention and GEMM", found.get("other_share"), 0.04),
        ("call error over eager bf16", record.get("accuracy", {}).get("ours_over_reference_ops_bf16"), 1.2),
        ("block error over eager bf16", record.get("block", {}).get("ours_over_reference_ops_bf16"), 1.2),
    ]
    return "\n".join(
        f"goal {name:<34}{value:8.4f} <= {limit:<5} {'met' if value <= limit else 'MISSED'}"
        for name, value, limit in values
        if value is not None
    )
