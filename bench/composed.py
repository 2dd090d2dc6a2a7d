"""The seconds of a whole job, composed of measured calls: every row says that it is composed, and of what.

A step evaluates both prompts. Ours does so in one pair; diffusers calls its network twice.
"""

from __future__ import annotations

from typing import Any


def composed(
    case: dict[str, Any], steps: int, vae: dict[str, Any] | None = None, vae_file: str | None = None
) -> dict[str, Any]:
    """Rows by variant of one case of a denoiser record (tools/bench_denoiser.py).

    case: its `variants` and `prepare_s`. vae: variants of a VAE record (ours_encode, ours_decode, diffusers_encode, ...), of
    which one control is encoded and one clip decoded; without them the rows are of the denoising alone.
    """
    variants, rows = case["variants"], {}
    for name, peer, pair in (
        ("ours", "ours", "ours_pair"), ("diffusers", "diffusers", None), ("diffusers_compiled", "diffusers", None),
    ):  # fmt: skip
        if name not in variants:
            continue
        step = variants[pair]["median_s"] if pair else 2 * variants[name]["median_s"]
        prepare = case["prepare_s"] if pair else 0.0  # a peer prepares nothing ahead
        row: dict[str, Any] = {"step_s": step, "prepare_s": prepare, "denoise_s": prepare + steps * step}
        parts = [(vae or {}).get(f"{peer}_{part}", {}).get("median_s") for part in ("encode", "decode")]
        if None not in parts:
            row |= {"encode_s": parts[0], "decode_s": parts[1], "seconds": row["denoise_s"] + sum(parts)}
        rows[name] = row
    return {
        "composed": True, "steps": steps, "calls": 2 * steps, "rows": rows, "vae_file": vae_file if vae else None,
        "how": f"{steps} times the median of a measured step, plus what is prepared once, plus one encoding and one decoding "
        "where the VAE was measured; not one uninterrupted run",
    }  # fmt: skip
