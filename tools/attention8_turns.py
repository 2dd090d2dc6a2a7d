"""Versions of the 8-bit attention kernel beside each other, for `bench_attention8.py --turns`: bits, then times in turns.

The clock that a card's power allows moves by more than versions differ; run after run in turns, all meet the same.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from statistics import median

import torch
from attention8_cases import DEVICE, HEADS, WIDTH
from attention8_proof import Records, Version, codes_of, lengths, memory, results, tile_lists
from attention8_watch import load, timed, watched
from torch import Tensor

from cosmos_fast.ops_attention8 import Codes

SHARES = (1.0, 0.5, 0.2, 0.02)
"""Of the key tiles, in ascending order; 1 is the dense form's alone."""
Lists = tuple[Tensor, Tensor] | tuple[()]


def lists_of(version: Version, length: int, share: float) -> Lists:
    if not version.rung.sparse:
        return ()
    return tile_lists(length, length, HEADS, version.rung, share, True)[:2]


def uneven(version: Version, length: int) -> Lists:
    """Lists of 0 to 60 tiles, a third of them empty."""
    if not version.rung.sparse:
        return ()
    draw = torch.Generator(DEVICE).manual_seed(2)
    tiles, counts, _ = tile_lists(length, length, HEADS, version.rung, 1.0, True)
    most = min(60, tiles.shape[2])
    some = torch.randint(-most // 2, most + 1, counts.shape, generator=draw, device=DEVICE)
    return tiles, some.clamp_min(0).int()


def agreeing(versions: list[Version], c: Codes, length: int) -> Records:
    """Whether versions of one kind give the bits of the first of them."""
    for label, make in (
        ("even", lambda v: lists_of(v, length, 0.2)),
        ("uneven", lambda v: uneven(v, length)),
    ):
        firsts: dict[bool, tuple[Tensor, ...]] = {}
        for v in versions:
            if label == "even" or v.rung.sparse:
                yield {"start": f"{v.rung.name} long", "patience": 20}
                got = v(c, *make(v))
                torch.cuda.synchronize()
                first = firsts.setdefault(v.rung.sparse, got)
                same = all(
                    torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                    for a, b in zip(first, got, strict=True)
                )
                yield {"section": "turns", "name": f"bits of {v.rung.name}", "lists": label, "ok": same}


def in_turns(versions: list[Version], length: int, turns: int, seconds: float) -> Records:
    """Versions that add in one order must agree bit for bit, dense with dense and listed with listed; then times.

    Those are the medians over turns of `seconds` each. At the end, what dense versions show at any length.
    """
    c = codes_of(length, length, HEADS)
    yield from agreeing(versions, c, length)
    room = results(c)
    jobs = [(v, share) for v in versions for share in SHARES if (share == 1.0) != v.rung.sparse]
    lists = {(v.rung.sparse, share): lists_of(v, length, share) for v, share in jobs}
    found: dict[tuple[str, float], list[float]] = {}
    with watched() as seen:
        for _ in range(turns):
            for v, share in jobs:
                yield {"start": f"{v.rung.name} long", "patience": seconds}
                run = partial(v.launch, c, *room, *lists[v.rung.sparse, share])
                found.setdefault((v.rung.name, share), []).append(timed(run, seconds)[0])
    whole = min((median(ms) for (_, share), ms in found.items() if share == 1.0), default=None)
    for (name, share), ms in found.items():
        middle, flop = median(ms), 4.0 * length**2 * HEADS * WIDTH * share
        # Of what the fastest dense version of this run takes for all tiles.
        over = middle / (whole * share) if whole else None
        yield {"section": "turns", "name": name, "share": share, "ms": middle, "tflops": flop / middle / 1e9,
               "over_proportional": over, "turns": ms}  # fmt: skip
    yield {"section": "turns", "name": "load"} | load(seen)
    for v in versions:
        for record in () if v.rung.sparse else chain(lengths(v), memory(v)):
            named = (
                {"name": f"{v.rung.name} {record.get('name')}"}
                if "section" in record
                else {"start": f"{v.rung.name} long"}
            )
            yield record | named
