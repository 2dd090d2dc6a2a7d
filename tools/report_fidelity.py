"""What tools/report.py says of 8-bit recipes: the `fidelity`, `layers` and `calls` of a record of tools/fidelity.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

TITLES = {
    "attention": "8-bit attention", "linear": "8-bit linears", "fp8": "both",
    "scheduled": "both, attention in bf16 at the first 20 % and last 10 % of the steps",
    "other library": "yardstick: exact, another attention library", "other seed": "yardstick: exact, another seed",
}  # fmt: skip
Table = tuple[list[str], list[list[str]]]


def tables(record: Mapping[str, Any]) -> Iterator[Table]:
    """(head, rows): videos beside exact ones, then the error of self-attention by way of making codes."""
    head = [f"{record['clips']} held-out clips, against exact", "PSNR dB", "worst clip", "worst frame", "SSIM",
            "latent, relative", "largest change of a control measure, %"]  # fmt: skip
    rows = []
    for name, row in record["fidelity"].items():
        changes = [abs(m["change"]) for m in row["measures"].values()]
        decibels = (f"{row[key]:.1f}" for key in ("psnr_db", "worst_clip_db", "worst_frame_db"))
        rest = f"{row['ssim']:.4f}", f"{row['latent']:.1e}", f"{100 * max(changes):.2f}" if changes else "–"
        rows.append([TITLES.get(name, name), *decibels, *rest])
    yield head, rows
    if layers := record.get("layers"):
        cells = [[way, f"{row['mean']:.2e}", f"{row['worst']:.2e}", row["worst_layer"]] for way, row in layers.items()]  # fmt: skip
        yield ["self-attention, relative error by way of making codes", "mean", "worst layer", "which"], cells
    if calls := record.get("calls"):
        keys = list(next(iter(calls.values())))
        cells = [[TITLES.get(name, name), *(f"{row[key]:.2e}" for key in keys)] for name, row in calls.items()]  # fmt: skip
        yield ["one call, relative error", *keys], cells


def shown(results: Any, table: Callable[..., str], note: Callable[..., str]) -> str | None:
    """The newest record of a GPU as tables."""
    if (found := results.own("fidelity", "fidelity")) is None:
        return None
    return "\n\n".join([*(table(*one) for one in tables(found[1])), note(*found[:2])])


def figures(results: Any) -> Iterator[tuple[str, float, str, str, dict[str, float]]]:
    """(key, value, unit, file, beside it): psnr_db.fp8, psnr_worst_db.fp8, edge_f1.edge.fp8, ...; same of other recipes."""
    if (found := results.own("fidelity", "fidelity")) is None:
        return
    file, _, rows = found
    seed = {"other_seed": rows["other seed"]["psnr_db"]} if "other seed" in rows else {}
    for name, row in rows.items():
        if not name.startswith("other"):
            yield f"psnr_db.{name}", row["psnr_db"], "dB", file, seed
            yield f"psnr_worst_db.{name}", row["worst_clip_db"], "dB", file, {}
            for tag, m in row["measures"].items():
                yield f"{m['measure']}.{tag}.{name}", m["value"], "1", file, {"exact": m["exact"]}
