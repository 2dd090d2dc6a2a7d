"""Launch choices of the producers of 8-bit attention's operands, for tools/bench_fp8_attention.py: each one's time, the best.

Every choice compiles a kernel, about a second; the groups that run with our attention come first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cosmos_fast import ops, ops_attention8

Calls = dict[str, Callable[[], Any]]
CONSTANTS = {
    "q, k": "ROTATED",
    "v": "VALUES",
    "moments": "MOMENTS",
    "restored": "RESTORED",
    "q, k, not rotated": "CODES",
}
"""Group of launch choices -> constant of kernels/qkv_codes.py."""
WORTH = 0.99
"""A choice must take less than so much of the present one's time to be named instead of it."""


def producers(run: Any, rounds: int) -> None:
    """Every launch choice of the producers, beside the exact one's; what runs with our attention first."""
    from cosmos_fast.kernels import norm_rope, qkv_codes
    from cosmos_fast.kernels.launch import Config

    given = run.inputs("gaussian")
    moments = ops_attention8.qkv_moments(*given)
    raw = torch.randn(run.L, run.N, run.K, device=run.device, dtype=torch.bfloat16)
    eps = ops.EPS

    def codes(rotate: bool, pack: bool, **config: Any) -> Callable[[], Any]:
        return partial(qkv_codes.qkv_codes, *given, *moments, rotate, pack, eps, **config)

    sums = partial(qkv_codes.qkv_moments, *given, eps)
    restored = partial(qkv_codes.values_restored, raw, moments[2], moments[1])
    defaults: Calls = {
        "qk_norm_rope": lambda: norm_rope.qk_norm_rope(*given, eps), "qkv_moments": sums,
        "qkv_codes rotated packed, as chosen": partial(ops_attention8.qkv_codes, *given, pack=True, moments=moments),
        "qkv_codes rotated packed": codes(True, True), "qkv_codes rotated": codes(True, False),
        "qkv_codes": codes(False, False), "values_restored": restored,
    }  # fmt: skip
    # By group, the choices (tokens, warps) of one program, and what one of them is.
    groups: dict[str, tuple[list[tuple[int, int]], Callable[[Config], Callable[[], Any]]]] = {
        "q, k": ([(b, w) for b in (1, 2, 4, 8) for w in (2, 4, 8)], lambda c: codes(True, True, config=c)),
        "v": ([(b, w) for b in (32, 64, 128, 256) for w in (2, 4, 8)], lambda c: codes(True, True, v_config=c)),
        "moments": ([(b, w) for b in (32, 64, 128, 256) for w in (4, 8, 16)], lambda c: partial(sums, config=c)),
        "restored": ([(b, w) for b in (4, 8, 16, 32) for w in (4, 8, 16)], lambda c: partial(restored, config=c)),
        "q, k, not rotated": ([(b, w) for b in (1, 2, 4) for w in (2, 4, 8)], lambda c: codes(False, False, config=c)),
    }  # fmt: skip
    with run.trial("producers defaults"):
        found = run.times_ms(run.once("producer", defaults), rounds)
        run.record["producers"]["defaults"] = found
        print("producers: " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in found.items()), flush=True)
    for group, (choices, make) in run.in_time("producers", groups.items()):
        with run.trial(f"producers {group}"):
            calls = {f"{b}/{w}": make(Config(b, w)) for b, w in choices}
            found = run.times_ms(run.once(f"producer {group}", calls), rounds)
            run.record["producers"][group] = found
            best = sorted(found.items(), key=lambda item: item[1])[:6]
            print(f"producers {group}: " + ", ".join(f"{name} {ms:.3f}" for name, ms in best), flush=True)
    present = {group: getattr(qkv_codes, name) for group, name in CONSTANTS.items()}
    run.record["constants"] = winners(
        run.record["producers"], {g: f"{c.block}/{c.warps}" for g, c in present.items()}
    )
    print("constants: " + "; ".join(run.record["constants"]), flush=True)


def winners(found: dict[str, dict[str, float]], present: dict[str, str]) -> list[str]:
    """A line for each group that was measured: the constant as it should read, and what it is against."""
    lines = []
    for group, name in CONSTANTS.items():
        if times := found.get(group):
            now = present[group]
            best = min(times, key=lambda choice: times[choice])
            if now in times and times[best] > WORTH * times[now]:
                best = now
            told = f"{times[best]:.3f} ms" + (
                f", {now} {times[now]:.3f} ms" if now in times and best != now else ""
            )
            lines.append(f"{name} = Config({best.replace('/', ', ')})  # {told}")
    return lines
