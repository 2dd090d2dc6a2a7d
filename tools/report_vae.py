"""What tools/report.py says of the video VAE: records of tools/bench_vae.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

NAMES = {"ours": "ours", "diffusers": "diffusers", "diffusers_channels_last": "diffusers, channels last"}
PARTS = ("encode", "decode")
Table = tuple[list[str], list[list[str]]]


SECTIONS = ("cases", "stages", "windows", "accuracy", "clip")


def newest(results: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, record) of each record that is the newest with some section; of the sections it has those alone."""
    found: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        if (one := results.own(section, "vae")) is not None:
            file, record, part = one
            rest = {key: value for key, value in record.items() if key not in SECTIONS}
            found.setdefault(file, rest)[section] = part
    yield from found.items()


def shown(results: Any, table: Callable[..., str], note: Callable[..., str]) -> str | None:
    """Each table from the newest record that has it, as tools/report.py writes tables and notes; None without one."""
    lines = [
        [*(table(*one) for one in tables(record)), note(file, record)] for file, record in newest(results)
    ]
    return "\n\n".join(line for lines_of_record in lines for line in lines_of_record) or None


def _num(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def tables(record: Mapping[str, Any]) -> Iterator[Table]:
    """(head, rows) of what the record has: whole calls, stages, windows and strips, errors, a clip's end."""
    variants = record.get("cases", {}).get("720", {}).get("variants", {})
    rows = []
    for part in PARTS:
        ours = variants.get(f"ours_{part}", {}).get("median_s")
        for name, title in NAMES.items():
            if (row := variants.get(f"{name}_{part}")) is not None:
                over = None if ours is None else row["median_s"] / ours
                rates = (row.get("tflop_s"), row.get("gemm_peak_pct"))
                rows.append([f"{part}, {title}", _num(row["median_s"], 3), _num(over, 2), *(_num(x, 0) for x in rates),
                             _num(row.get("own_peak_gib"), 2)])  # fmt: skip
    if rows:
        yield (
            ["VAE, 93 frames, 720p, bf16", "s", "time over ours", "TFLOP/s", "% of GEMM peak", "peak GiB"],
            rows,
        )
    if "stages" in record:
        yield ["stage", "ms", "TFLOP/s", "% of GEMM peak"], list(_stages(record["stages"]))
    if "windows" in record:
        rows = [
            [name, _num(row["seconds"], 3), _num(row.get("call_gib"), 2), _num(row.get("told_gib"), 2)]
            for name, row in record["windows"].items()
            if "seconds" in row
        ]
        yield (
            [
                "frames or latent frames at once; strips of rows",
                "s",
                "GiB beside weights and clip",
                "as the plan tells",
            ],
            rows,
        )
    if "accuracy" in record:
        yield _errors(record["accuracy"])
    if "clip" in record:
        best: dict[str, Any] = {}  # the quickest run of each thing that is shown
        for run in sorted(record["clip"]["runs"], key=lambda run: run["last_step_to_mp4_s"]):
            best.setdefault(run.get("content", "noise"), run)
        rows = []
        for content, one in best.items():
            stages = one["stages"]
            rows.append([content, _num(one["last_step_to_mp4_s"], 2), _num(stages["decode"]["seconds"], 2), _num(stages["write"]["seconds"], 2),
                         _num(stages["write"].get("beside_s"), 2), str(record["clip"]["cpus"])])  # fmt: skip
        yield (
            ["shown", "last denoising step to mp4, s", "of it decode", "then writing", "writing beside both", "CPUs"],
            rows,
        )  # fmt: skip


def _stages(stages: Mapping[str, Any]) -> Iterator[list[str]]:
    for part, one in stages.items():
        for name, row in one["rows"].items():
            share = row.get("floor_share")
            cells = (_num(1e3 * row["seconds"], 1), _num(row["tflop_s"], 0), _num(share and 100 * share, 0))
            yield [f"{part}, {name}", *cells]
        yield [f"{part}, the rest", _num(1e3 * one["rest_s"], 1), "–", "–"]


def _errors(found: Mapping[str, Any]) -> Table:
    errors, size = found["bf16_relative_l2"], " x ".join(map(str, found["size"]))
    rows = []
    for part in PARTS:
        exact = [x for name, x in found["fp32_max_difference"].items() if name.startswith(part)]
        rows.append([f"{part}, {size}", f"{max(exact):.1e}", *(f"{errors[f'{name}_{part}']:.2e}" for name in ("ours", "diffusers"))])  # fmt: skip
    head = [
        "error",
        "fp32, greatest difference to diffusers in any window",
        "ours, bf16, relative L2 to fp32",
        "diffusers, bf16",
    ]
    return head, rows


def figures(record: Mapping[str, Any]) -> Iterator[tuple[str, float | None, str, dict[str, float]]]:
    """(key, value, unit, peers): vae_encode_s, vae_decode_s, vae_decode_peak_gib, .strips, vae_error..., vae_to_mp4_s."""
    variants = record.get("cases", {}).get("720", {}).get("variants", {})

    def each(part: str, of: str) -> tuple[float | None, dict[str, float]]:
        found = {
            n.removesuffix(f"_{part}"): v[of] for n, v in variants.items() if n.endswith(part) and of in v
        }
        return found.pop("ours", None), found

    for part in PARTS:
        for key, of, unit in (
            (f"vae_{part}_s", "median_s", "s"),
            (f"vae_{part}_peak_gib", "own_peak_gib", "GiB"),
        ):
            value, peers = each(part, of)
            yield key, value, unit, peers
        if (found := record.get("accuracy")) is not None:
            errors = found["bf16_relative_l2"]
            yield f"vae_{part}_error", errors[f"ours_{part}"], "1", {"diffusers": errors[f"diffusers_{part}"]}
    for name, row in record.get("windows", {}).items():
        if name.startswith("decode") and "strips" in name and "call_gib" in row:
            yield "vae_decode_peak_gib.strips", row["call_gib"], "GiB", {}
    if "clip" in record:
        yield "last_step_to_mp4_s", record["clip"]["last_step_to_mp4_s"], "s", {}
