"""What tools/report.py says of 8-bit recipes: the clips, goals, layers, products and calls of a record of tools/fidelity.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

TITLES = {
    "attention": "8-bit attention", "linear": "8-bit linears", "fp8": "both",
    "scheduled": "both, attention in bf16 at the first 20 % and last 10 % of the steps", "te": "linears of Transformer Engine",
    "other library": "yardstick: exact, another attention library", "other seed": "yardstick: exact, another seed",
}  # fmt: skip
Table = tuple[list[str], list[list[str]]]


def tables(record: Mapping[str, Any]) -> Iterator[Table]:
    """(head, rows): videos beside exact ones, then the errors of layers by way of making codes, and of calls."""
    head = [f"{record['clips']} held-out clips, against exact", "PSNR dB", "worst clip", "worst frame", "SSIM",
            "latent, relative", "largest change of a control measure, %"]  # fmt: skip
    rows = []
    for name, row in record["fidelity"].items():
        changes = [abs(m["change"]) for m in row["measures"].values()]
        decibels = (f"{row[key]:.1f}" for key in ("psnr_db", "worst_clip_db", "worst_frame_db"))
        rest = f"{row['ssim']:.4f}", f"{row['latent']:.1e}", f"{100 * max(changes):.2f}" if changes else "–"
        rows.append([TITLES.get(name, name), *decibels, *rest])
    yield head, rows
    for key, what in (("layers", "self-attention"), ("products", "linear layers")):
        if found := record.get(key):
            cells = [
                [way, f"{row['mean']:.2e}", f"{row['worst']:.2e}", row["worst_layer"]]
                for way, row in found.items()
            ]
            yield [f"{what}, relative error by way of making codes", "mean", "worst layer", "which"], cells
    if calls := record.get("calls"):
        keys = list(next(iter(calls.values())))
        cells = [
            [TITLES.get(name, name), *(f"{row[key]:.2e}" if key in row else "–" for key in keys)]
            for name, row in calls.items()
        ]
        yield ["one call, relative error", *keys], cells


def verdict(goals: list[Mapping[str, Any]]) -> str:
    """Which goals are met, with their values, which are missed, and which have no value, for some request failed."""
    by_title: dict[str, list[str]] = {"Met": [], "Missed": [], "Not measured": []}
    for g in goals:
        if g["value"] is None:
            by_title["Not measured"].append(g["metric"])
        else:
            error = f" ± {g['error']:.2g}" if g.get("error") else ""
            by_title["Met" if g["passed"] else "Missed"].append(f"{g['metric']} {g['value']:.3g}{error} ({g['rule']} {g['goal']:g})")  # fmt: skip
    return " ".join(f"{title}: {', '.join(told)}." for title, told in by_title.items() if told)


def shown(results: Any, table: Callable[..., str], note: Callable[..., str]) -> str | None:
    """The newest record of a GPU as tables."""
    if (found := results.own("fidelity", "fidelity")) is None:
        return None
    parts = [*(table(*one) for one in tables(found[1])), verdict(found[1].get("goals", [])), note(*found[:2])]
    return "\n\n".join(part for part in parts if part)


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
