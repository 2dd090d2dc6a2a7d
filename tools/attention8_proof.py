"""What a version of the 8-bit attention kernel must show beside its peers: the sections of tools/bench_attention8.py.

Each section yields records as it goes. They take kernels as `Attend`: (q, k, v packed, score_step, v_step, v_mean) of
`ops_attention8.Codes` -> (out bf16, lse), with lists of key tiles where the version takes them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from attention8_activations import Attend8, activations
from attention8_cases import DEVICE, HEADS, WIDTH, lse_allowed, relative
from attention8_rungs import ROOT, Args, Rung
from attention8_watch import column, mean_load, timed, watched
from torch import Tensor

sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from cosmos_fast import reference, testing  # noqa: E402
from cosmos_fast.ops_attention8 import Codes  # noqa: E402
from cosmos_fast.ops_tiles import estimated_tiles  # noqa: E402

SECTIONS = ("sustained", "errors", "lengths", "memory", "sparse", "activations")
SHARES = (0.5, 0.35, 0.2, 0.1, 0.05, 0.03, 0.02)
LENGTHS = (
    (1, 1), (2, 3), (31, 33), (193, 97), (1, 170_000), (1000, 16_383), (170_000, 777), (84_481, 84_479), (169_999, 169_999),
)  # fmt: skip
POISONED = ((1001, 4113, 3), (84_480, 84_480, 2))
MASKED = (3001, 5003)
Record = dict[str, Any]
Records = Iterator[Record]


@dataclass(frozen=True)
class Version:
    """A compiled rung on the operands of the package."""

    rung: Rung
    call: Callable[[Args], None]

    def launch(
        self, codes: Codes, out: Tensor, lse: Tensor, tiles: Tensor | None = None, counts: Tensor | None = None
    ) -> None:  # fmt: skip
        """codes: v packed. A k_scale of null is 1, and a q_scale of stride 0 is one for all heads."""
        c, pointer = codes, lambda x: None if x is None else x.data_ptr()
        (L, N, _), S, row = c.q.shape, c.k.shape[0], c.q.shape[1] * WIDTH
        self.call(Args(
            q=pointer(c.q), k=pointer(c.k), v=pointer(c.v), out=pointer(out), lse=pointer(lse), q_scale=pointer(c.score_step),
            v_scale=pointer(c.v_step), v_mean=pointer(c.v_mean), key_tiles=pointer(tiles), key_counts=pointer(counts),
            num_queries=L, num_keys=S, q_row=row, q_head=WIDTH, k_row=row, k_head=WIDTH, v_row=c.v.shape[2], out_row=row,
            out_head=WIDTH, num_heads=N, key_capacity=0 if tiles is None else tiles.shape[2], softmax_scale=1.0,
        ))  # fmt: skip

    def __call__(
        self, codes: Codes, tiles: Tensor | None = None, counts: Tensor | None = None, poison: int = 0xFF
    ) -> tuple[Tensor, Tensor]:
        """(out, lse). poison: byte that both are full of before; 0xFF makes them NaN."""
        if codes.v.shape == codes.k.shape:
            codes = replace(codes, v=reference.packed(codes.v))
        out, lse = results(codes)
        out.view(torch.uint8).fill_(poison), lse.view(torch.uint8).fill_(poison)
        self.launch(codes, out, lse, tiles, counts)
        return out, lse

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, step: Tensor, v_step: Tensor, v_mean: Tensor, out: torch.dtype
    ) -> Tensor:  # fmt: skip
        return self(Codes(q, k, v, step, v_step, v_mean))[0].to(out)


def results(c: Codes) -> tuple[Tensor, Tensor]:
    """Room for output and log-sum-exp."""
    out = torch.empty(c.q.shape, dtype=torch.bfloat16, device=c.q.device)
    return out, torch.empty(c.q.shape[1], c.q.shape[0], device=c.q.device)


def codes_of(L: int, S: int, N: int, seed: int = 0, spread: float = 30.0) -> Codes:
    """Random codes with scores up to about 5 and v centred, packed."""
    draw = torch.Generator(DEVICE).manual_seed(seed + 7 * L + S)
    q, k, v = (
        (torch.randn(n, N, WIDTH, generator=draw, device=DEVICE) * spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        for n in (L, S, S)
    )  # fmt: skip
    v_step = torch.rand(N, WIDTH, generator=draw, device=DEVICE) + 0.5
    v_mean = torch.randn(N, WIDTH, generator=draw, device=DEVICE)
    step = torch.full((1,), 1.5 * WIDTH**-0.5 / spread**2, device=DEVICE)
    return Codes(q, k, reference.packed(v), step, v_step, v_mean)


def rows_in_fp64(c: Codes, rows: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Output less v's mean (rows, N, K), lse (N, rows), largest score; keep (N, rows, S): the keys that count."""
    v = reference.unpacked(c.v, c.k.shape[0]) if c.v.shape != c.k.shape else c.v
    outs, lses, largest = [], [], 0.0
    for n in range(c.q.shape[1]):
        scores = c.q[rows, n].double() @ c.k[:, n].double().T * c.score_step.double()
        largest = max(largest, float(scores.abs().max()))
        if keep is not None:
            scores = scores.masked_fill(~keep[n], -math.inf)
        lse = scores.logsumexp(-1)
        weights = torch.nan_to_num((scores - lse[:, None]).exp())
        outs.append(weights @ (v[:, n].double() * c.v_step[n].double()))
        lses.append(lse)
    return torch.stack(outs, 1), torch.stack(lses), largest


def compared(c: Codes, got: tuple[Tensor, Tensor], rows: Tensor, keep: Tensor | None = None) -> Record:
    """Errors of some rows against fp64; `ok` where both are within what rounding explains."""
    exact, exact_lse, largest = rows_in_fp64(c, rows, keep)
    out, lse = got[0][rows].double() - c.v_mean.double(), got[1][:, rows].double()
    seen = exact_lse.isfinite()
    error = relative(out, exact)
    lse_error = float((lse - exact_lse)[seen].abs().max()) if bool(seen.any()) else 0.0
    # bf16 rounds the output with its mean, which is of the size of a value; the rest is what an average leaves of one.
    rounding = 2.0**-9 * float((exact + c.v_mean.double()).norm() / exact.norm().clamp_min(1e-30))
    ok = (
        error < 0.04 + 2 * rounding and lse_error < lse_allowed(largest) and torch.equal(lse.isfinite(), seen)
    )
    return {"error": error, "lse_error": lse_error, "ok": bool(ok)}


def sample(L: int, count: int = 32) -> Tensor:
    return torch.linspace(0, L - 1, min(count, L), device=DEVICE).long().unique()


# --- sections ------------------------------------------------------------------------------------------


def sustained(runs: dict[str, Callable[[], Any]], flop: float, seconds: float) -> Records:
    """Each for some seconds without a break. Clock and power: means over all samples but those of the first second."""
    for name, run in runs.items():
        yield {"start": f"sustained {name}", "patience": seconds + 10}
        run()
        torch.cuda.synchronize()
        count, begin, before = 0, time.monotonic(), None
        with watched() as seen:
            while time.monotonic() - begin < seconds:
                run()
                done = torch.cuda.Event()
                done.record()
                if before is not None:  # one call is always waiting
                    before.synchronize()
                before, count = done, count + 1
            torch.cuda.synchronize()
            taken = time.monotonic() - begin
        rows = seen[int(len(seen) / max(taken, 1)) :]
        clock = column(rows, "sm_mhz")
        yield {
            "section": "sustained", "name": name, "tflops": flop * count / taken / 1e12, "ms": 1e3 * taken / count,
            "seconds": taken, "runs": count, **mean_load(rows),
            "samples": len(rows), "clock_range": [min(clock, default=None), max(clock, default=None)],
        }  # fmt: skip


def errors(options: argparse.Namespace, ways: dict[str, Attend8]) -> Records:
    """Of one layer at production size, against fp64 of unquantised operands: inputs that are hard for 8 bits."""
    import bench_fp8_attention as layers

    from cosmos_fast import ops, ops_attention8

    run = layers.Run(options)
    rows = torch.linspace(0, run.L - 1, layers.ROWS, device=run.device).long()
    for kind in layers.KINDS:
        yield {"start": f"errors {kind}", "patience": 45}
        given = run.inputs(kind)
        q, k, v = ops.qk_norm_rope(*given)
        exact = layers.exact_rows(q, k, v, rows)
        found: dict[str, Any] = {"bf16": relative(ops.attention(q, k, v)[rows].view_as(exact), exact)}
        del q, k, v
        for rotate in (True, False):
            c = ops_attention8.qkv_codes(*given, rotate=rotate, pack=True)
            operands = c.q, c.k, c.v, c.score_step, c.v_step, c.v_mean, torch.bfloat16
            for name, attend in ways.items():
                label = f"{name} {'rotated' if rotate else 'smoothed'}"
                try:
                    found[label] = relative(attend(*operands)[rows].view_as(exact), exact)
                except Exception as error:
                    found[label] = f"{type(error).__name__}: {error}"[:160]
        pair = [found.get(f"{name} rotated") for name in ("own", "fa3")]
        ok = pair[0] <= 1.02 * pair[1] if all(isinstance(x, float) for x in pair) else None
        yield {"section": "errors", "name": kind, "relative": found, "ok": ok}


def lengths(version: Version) -> Records:
    """Any number of queries and keys, few heads."""
    for L, S in LENGTHS:
        yield {"start": f"length {L} x {S}", "patience": 15}
        c = codes_of(L, S, 2)
        yield {"section": "lengths", "name": f"{L} x {S}"} | compared(c, version(c), sample(L))


def memory(version: Version) -> Records:
    """The same bits whatever results and what lies around the operands held before: NaN in most."""
    for L, S, N in POISONED:
        c = codes_of(L, S, N)
        first = version(c)
        faults = [] if all(bool(x.isfinite().all()) for x in first) else ["values that nobody wrote"]
        moved = {}
        for name in ("q", "k", "v"):
            x = getattr(c, name)
            room = torch.full((x.numel() + (1 << 20),), 0x7F, dtype=torch.uint8, device=DEVICE)  # NaN
            room[1 << 19 : (1 << 19) + x.numel()] = x.flatten().view(torch.uint8)
            moved[name] = room[1 << 19 : (1 << 19) + x.numel()].view(x.dtype).view(x.shape)
        among_nan = Codes(**(vars(c) | moved))
        for label, codes, poison in (
            ("zeros before", c, 0),
            ("large before", c, 0x7E),
            ("NaN around", among_nan, 0xFF),
        ):
            again = version(codes, poison=poison)
            if not all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                for a, b in zip(first, again, strict=True)
            ):
                faults.append(label)
        yield {"section": "memory", "name": f"{L} x {S}", "ok": not faults, "faults": faults}


def tile_lists(
    L: int, S: int, N: int, rung: Rung, share: float, ascending: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of as many random tiles for each query tile, their lengths, and the flags (N, query tiles, key tiles)."""
    draw = torch.Generator(DEVICE).manual_seed(seed)
    rows, columns = -(-L // rung.queries), -(-S // rung.keys)
    amount = max(round(share * columns), 1)
    chosen = torch.rand(N, rows, columns, generator=draw, device=DEVICE).argsort(-1)[..., :amount]
    if ascending:
        chosen = chosen.sort(-1).values
    flags = torch.zeros(N, rows, columns, dtype=torch.bool, device=DEVICE).scatter_(2, chosen, True)
    counts = torch.full((N, rows), amount, dtype=torch.int32, device=DEVICE)
    return chosen.int().contiguous(), counts, flags


SPARSE_TURNS = 3


def sparse(version: Version, dense: Version, length: int, seconds: float) -> Records:
    """Equal to a masked reference; then the time of a share of the tiles over that share of the dense time."""
    rung = version.rung
    for L, S in (MASKED, (length, length)):
        c = codes_of(L, S, 2, seed=1)
        rows = sample(L)
        for ascending in (True, False):
            tiles, counts, flags = tile_lists(L, S, 2, rung, 0.35, ascending)
            keep = flags[:, rows // rung.queries].repeat_interleave(rung.keys, 2)[..., :S]
            told = compared(c, version(c, tiles, counts), rows, keep)
            yield {"section": "sparse", "name": f"masked {L} x {S}", "ascending": ascending} | told
        every, counts, _ = tile_lists(L, S, 2, rung, 1.0, True)
        # Their sums may be in another order.
        apart = [relative(a, b.double()) for a, b in zip(version(c, every, counts), dense(c), strict=True)]
        yield {"section": "sparse", "name": f"all tiles {L} x {S}", "ok": max(apart) < 2e-3, "apart": apart}
    c = codes_of(length, length, HEADS)
    room = results(c)
    filled, runs = timed(lambda: estimated_tiles(c, share=0.35, mass=0.95), seconds)
    yield {"section": "sparse", "name": "filling the lists", "ms": filled, "runs": runs}
    for ascending in (True, False):
        for share in SHARES if ascending else SHARES[:3]:
            yield {"start": f"sparse {share}", "patience": 5}
            tiles, counts, _ = tile_lists(length, length, HEADS, rung, share, ascending)
            # In turns with the dense form: the clock that the card's power allows moves more than 8 % from run to run.
            turns = [
                (timed(lambda: dense.launch(c, *room), seconds)[0],
                 *timed(lambda lists=(tiles, counts): version.launch(c, *room, *lists), seconds))
                for _ in range(SPARSE_TURNS)
            ]  # fmt: skip
            kept = float(counts[0, 0]) / -(-length // rung.keys)
            over = median(mine / whole for whole, mine, _ in turns) / max(kept, 0.03)
            dense_ms, ms, runs = (median(found) for found in zip(*turns, strict=True))
            yield {"section": "sparse", "name": f"{share:.0%}", "ascending": ascending, "kept": kept, "ms": ms,
                   "dense_ms": dense_ms, "over_proportional": over, "runs": runs, "ok": over <= 1.08}  # fmt: skip


# --- all of them ---------------------------------------------------------------------------------------


def peers8() -> dict[str, Attend8]:
    """Attention over the same codes by libraries, those that run here."""
    from cosmos_fast.dispatch import TABLE

    found = {}
    for candidate in TABLE["attention_fp8"].candidates:
        if candidate.name in ("fa3", "cudnn"):
            try:
                if reason := candidate.obstacle(torch.device(DEVICE), torch.float8_e4m3fn):
                    raise RuntimeError(reason)
                found[candidate.name] = candidate.load()
            except Exception as error:
                print(f"    no {candidate.name}: {type(error).__name__}: {str(error)[:160]}", flush=True)
    return found


def timed_alone(length: int, version: Version) -> dict[str, Callable[[], Any]]:
    """Attention alone on one set of values, by us and by libraries: what their kernels take, nothing before or behind."""
    from cosmos_fast import attention, attention8

    c = codes_of(length, length, HEADS)
    plain = reference.unpacked(c.v, length)
    room = results(c)
    runs: dict[str, Callable[[], Any]] = {f"own {version.rung.name}": lambda: version.launch(c, *room)}
    # Scores as large as those of the codes.
    factor = float(c.score_step * WIDTH**0.5) ** 0.5
    half = [(x.float() * factor).bfloat16() for x in (c.q, c.k)] + [plain.bfloat16()]
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "fa3 fp8": lambda: partial(attention8.load_fa3(), c.q, c.k, plain, c.score_step, torch.bfloat16),
        "cudnn fp8": lambda: partial(attention8.load_cudnn(), c.q, c.k, plain, c.score_step, torch.bfloat16),
        "fa3 bf16": lambda: partial(attention.load_fa3(), *half),
    }
    for name, make in makers.items():
        try:
            runs[name] = make()
            runs[name]()
            torch.cuda.synchronize()
        except Exception as error:
            runs.pop(name, None)
            print(f"    no {name}: {type(error).__name__}: {str(error)[:160]}", flush=True)
    return runs


def prove(dense: Version, listed: Version | None, options: argparse.Namespace, seconds: float) -> Records:
    """The sections asked for, one after the other; one that fails is recorded and the next goes on. seconds: time left."""
    testing.kernels_from_checkout()
    end = time.monotonic() + seconds
    ways: dict[str, Attend8] = {"own": dense.attend} | peers8()
    # The latent of a 93-frame clip, or one row of other tokens.
    grid = "24,88,160" if options.length == 84_480 else f"1,2,{2 * options.length}"
    layer = argparse.Namespace(smoke=False, deadline_s=seconds, grid=grid, commit=options.commit)
    flop = 4.0 * options.length**2 * HEADS * WIDTH
    makers: dict[str, Callable[[], Records]] = {
        "errors": lambda: errors(layer, ways), "lengths": lambda: lengths(dense), "memory": lambda: memory(dense),
        "activations": lambda: activations(ways),
        "sustained": lambda: sustained(timed_alone(options.length, dense), flop, options.long),
        "sparse": lambda: iter(()) if listed is None else sparse(listed, dense, options.length, 0.25),
    }  # fmt: skip
    for name in options.sections.split(","):
        if time.monotonic() > end:
            yield {"section": name, "name": "not begun", "ok": False, "fault": "no time left"}
            continue
        begin = time.monotonic()
        yield {"start": name, "patience": 60}
        try:
            with torch.inference_mode():
                yield from makers[name]()
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"[:300]
            yield {"section": name, "name": "failed", "ok": False, "fault": fault}
            if "CUDA error" in fault:
                raise
        torch.cuda.empty_cache()
        yield {"section": name, "name": "took", "seconds": time.monotonic() - begin}
