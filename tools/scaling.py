"""What a step takes on 1, 2, 4, 8 and 16 GPUs, by arithmetic from measured rates, beside what was measured.

    python tools/scaling.py                     every GPU kind in bench/results: rates and steps of its newest records
    python tools/scaling.py RECORD.json         rates of this record (of bench_scaling.py, or bench_denoiser.py)
    python tools/scaling.py --link 300 --network 40     GB/s a GPU sends within its host, and to others, where not measured
    python tools/scaling.py --recipe fp8        attention and linear layers in 8 bits, by ratios of the newest record of bench_fp8.py

A step is two passes of guidance over 93 frames at 720p, or one of the distilled network. Its time on a rank is

    (attention + products + pointwise) / context + gaps + exchange that nothing hides + guidance exchange

Every rank sends, per self-attention, the q, k and v of its tokens to those who have the heads and gets its tokens' sums
back: 4 * b * L * D bytes * (P - 1) / P^2 with P = context and b = 2 bytes a value, 1 where they travel as codes of 8 bits, both
ways (recipe fp8). The heads go in `parts` pieces, and what is sent while another piece is attended is hidden as
far as that attention is long enough. Codes need means and steps of all tokens first: 48 bytes a channel from each rank to each,
which nothing hides. A clip is its steps, and the VAE's strips: each rank computes rows beside its own again. Encoding waits for frames, which one rank reads for all. No torch is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cosmos_fast.vae_keys import vae_flops  # noqa: E402
from cosmos_fast.vae_rows import shared_flops  # noqa: E402

RESULTS = ROOT / "bench" / "results"

TOKENS, WIDTH, ATTENTIONS, SHARED = 84_480, 2_048, 32, 2
"""Tokens, width, self-attentions of one pass, and how many of these both passes share on one rank."""
HEADS, PARTS = 16, 4
VELOCITY_BYTES = 16 * 24 * 88 * 160 * 4
BASE_STEPS, DISTILLED_STEPS = 35, 4
PIXELS = 93, 704, 1280
LINK_GB_S, NETWORK_GB_S = 350.0, 45.0
"""Assumed where not measured: what NCCL gets of an H100's NVLink in one direction, and of a 400 Gb/s port."""
HOST = 8
MOMENT_BYTES = 48 * WIDTH
"""Sums in fp64 of k and v, the least and the largest v in fp32."""


@dataclass(frozen=True)
class Rates:
    """Seconds on one GPU: of one pass by class, of both passes together, of the clip outside the steps.

    encode_s, decode_s: what ranks share, each with a strip of rows. read_s: reading, beside the encode. fixed_s: what no rank shares.
    link, network: GB/s one GPU sends to others of its host and to other hosts, in one direction.
    operand_bytes: of a value of q, k or v on its way, 2 or, as 8-bit codes, 1.
    """

    attention_s: float
    product_s: float
    pointwise_s: float
    gaps_s: float
    pair_s: float
    encode_s: float = 0.0
    decode_s: float = 0.0
    read_s: float = 0.0
    fixed_s: float = 0.0
    link: float = LINK_GB_S
    network: float = NETWORK_GB_S
    operand_bytes: int = 2

    def in_8_bits(self, ratios: dict[str, float]) -> Rates:
        """Those of the recipe fp8; ratios: its time over that of exact, by class."""
        one = replace(
            self,
            attention_s=ratios["attention"] * self.attention_s,
            product_s=ratios["gemm"] * self.product_s,
            pointwise_s=ratios["pointwise"] * self.pointwise_s,
            operand_bytes=1,
        )
        return replace(one, pair_s=self.pair_s * one.call_s / self.call_s)

    @property
    def call_s(self) -> float:
        """One pass alone."""
        return self.attention_s + self.product_s + self.pointwise_s + self.gaps_s


@dataclass(frozen=True)
class Step:
    """Where the time of one step goes on a rank, in seconds; hidden_s is not part of the sum."""

    compute_s: float
    hidden_s: float
    exposed_s: float
    idle_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s + self.idle_s


def exchange_bytes(context: int, operand_bytes: int = 2) -> tuple[float, float]:
    """Bytes a rank sends for one self-attention: q, k, v out, and the attended values back."""
    values = TOKENS * WIDTH * (context - 1) / context**2
    return 3 * operand_bytes * values, operand_bytes * values


def send_s(num_bytes: float, peers: int, here: int, rates: Rates) -> float:
    """Seconds to send so many bytes evenly to `peers` others, `here` of them on this host; both ways at once."""
    if peers == 0:
        return 0.0
    local = num_bytes * here / peers / (rates.link * 1e9)
    away = num_bytes * (peers - here) / peers / (rates.network * 1e9)
    return max(local, away)


def exchange_s(context: int, rates: Rates, parts: int | None = None, host: int = HOST) -> tuple[float, float]:
    """(hidden, exposed) seconds of the exchanges of one self-attention on a rank. parts: None for the default."""
    if context == 1:
        return 0.0, 0.0
    parts = parts or max(1, min(PARTS, HEADS // context))
    peers, here = context - 1, min(context, host) - 1
    out, back = (send_s(size, peers, here, rates) for size in exchange_bytes(context, rates.operand_bytes))
    first = send_s(MOMENT_BYTES * peers, peers, here, rates) if rates.operand_bytes == 1 else 0.0
    # The first piece is waited for, and the last to come back; what is between can lie under the attention of a piece.
    bare = (out + back) / parts
    between = (out + back) - bare
    attention = rates.attention_s / ATTENTIONS / context * (parts - 1) / parts
    hidden = min(between, attention)
    return hidden, first + bare + between - hidden


def step(
    context: int, cfg: int, rates: Rates, *, guided: bool = True, parts: int | None = None, host: int = HOST
) -> Step:
    """One step on context * cfg ranks. cfg=2 puts the passes on two halves: nothing of them is shared then."""
    together = guided and cfg == 1
    busy = rates.pair_s - 2 * rates.gaps_s if together else rates.call_s - rates.gaps_s
    exchanges = 2 * ATTENTIONS - SHARED if together else ATTENTIONS
    hidden, exposed = (exchanges * s for s in exchange_s(context, rates, parts, host))
    if guided and cfg == 2:
        peers_here = 1 if 2 * context <= host else 0
        exposed += send_s(VELOCITY_BYTES, 1, peers_here, rates)
    return Step(busy / context, hidden, exposed, rates.gaps_s * (2 if together else 1))


def clip_s(
    context: int, cfg: int, rates: Rates, *, guided: bool = True, steps: int | None = None, host: int = HOST
) -> float:
    """Seconds of one clip from request to file."""
    count = steps or (BASE_STEPS if guided else DISTILLED_STEPS)
    one = step(context, cfg, rates, guided=guided, host=host)
    encode, decode = vae_shares(context * cfg)
    return (
        count * one.total_s
        + max(encode * rates.encode_s, rates.read_s)
        + decode * rates.decode_s
        + rates.fixed_s
    )


@cache
def vae_shares(ranks: int) -> tuple[float, float]:
    """Parts of one GPU's (encode, decode) that each of so many ranks computes."""
    encode, decode = (
        part / whole for part, whole in zip(shared_flops(*PIXELS, ranks), vae_flops(*PIXELS), strict=True)
    )
    return encode, decode


LAYOUTS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2), (16, 1))
"""(context, cfg): 1 to 8 GPUs of a host, then 16 of two."""


Times = dict[tuple[bool, int, int], float]
"""Seconds by (guided, context, cfg)."""


def beside(predicted: float, measured: float | None) -> str:
    """A measured time and by how many percent the prediction is off."""
    return f"{measured:>9.3f} {100 * (predicted / measured - 1):>6.1f}" if measured else f"{'-':>9} {'-':>6}"


def table(rates: Rates, steps: Times, clips: Times, *, guided: bool) -> str:
    """Rows by layout: seconds of a step by kind, speed over one GPU, and what was measured of step and clip."""
    lines = [
        f"{'GPUs':>5} {'context':>8} {'cfg':>4} {'compute':>9} {'hidden':>8} {'exposed':>8} {'gaps':>7} {'step s':>8} "
        f"{'x':>6} {'eff %':>6} {'measured':>9} {'off %':>6} {'clip s':>8} {'measured':>9} {'off %':>6}"
    ]
    alone = step(1, 1, rates, guided=guided).total_s
    for context, cfg in LAYOUTS:
        if cfg == 2 and not guided:
            continue
        one, ranks = step(context, cfg, rates, guided=guided), context * cfg
        gain = alone / one.total_s
        key, clip = (guided, context, cfg), clip_s(context, cfg, rates, guided=guided)
        lines.append(
            f"{ranks:>5} {context:>8} {cfg:>4} {one.compute_s:>9.3f} {one.hidden_s:>8.3f} {one.exposed_s:>8.3f} "
            f"{one.idle_s:>7.4f} {one.total_s:>8.3f} {gain:>6.2f} {100 * gain / ranks:>6.1f} "
            f"{beside(one.total_s, steps.get(key))} {clip:>8.1f} {beside(clip, clips.get(key))}"
        )
    return "\n".join(lines)


# --- records ---------------------------------------------------------------------------------------


def rates_of(record: dict[str, Any], link: float | None = None, network: float | None = None) -> Rates | None:
    """Rates of a record of bench_scaling.py or bench_denoiser.py; None if it lacks them. Given links win."""
    trace = record.get("trace", {})
    if record.get("args", {}).get("smoke") == "True" or "ours" not in trace:
        return None
    rows = record.get("cases", {}).get("720", {}).get("variants", {})
    pair_s = rows.get("ours_pair", {}).get("median_s") or record.get("loops", {}).get("one", {}).get("step_s")
    if pair_s is None:
        return None
    classes = trace["ours"]["classes_ms"]
    clip = record.get("distilled", {}).get("one", {})
    stages = clip.get("stages", {})
    return Rates(
        attention_s=classes["attention"] / 1e3, product_s=classes["gemm"] / 1e3,
        pointwise_s=(classes["pointwise"] + classes["copy"]) / 1e3, gaps_s=trace["ours"]["idle_ms"] / 1e3,
        pair_s=pair_s, encode_s=stages.get("encode", 0.0), decode_s=stages.get("decode", 0.0),
        read_s=clip.get("beside_s", {}).get("inputs", 0.0),
        fixed_s=sum(s for name, s in stages.items() if name not in ("encode", "decode", "denoise")),
        link=link or link_of(record) or LINK_GB_S, network=network or NETWORK_GB_S,
    )  # fmt: skip


def ratios_of(records: Iterable[dict[str, Any]]) -> dict[str, float] | None:
    """Time of the recipe fp8 over that of exact by class, of the newest record of bench_fp8.py that traced both."""
    traced = []
    for record in records:
        kernels = record.get("call", {}).get("kernels", {}) if record.get("kind") == "fp8" else {}
        if {"exact", "fp8"} <= set(kernels):
            traced.append((str(record["environment"]["date"]), kernels))
    if not traced:
        return None
    exact, fp8 = (max(traced, key=lambda found: found[0])[1][name]["classes_ms"] for name in ("exact", "fp8"))
    return {name: fp8[name] / exact[name] for name in ("attention", "gemm", "pointwise")}


def link_of(record: dict[str, Any]) -> float | None:
    """GB/s of the exchange that ranks of one host use: copies where they can be had."""
    found = record.get("copies") or record.get("link") or {}
    return found.get("all_to_all_gb_s")  # type: ignore[no-any-return]


LOOPS = {"one": (True, 1, 1), "cfg2": (True, 1, 2), "context2": (True, 2, 1), "distilled_one": (False, 1, 1),
         "distilled_context2": (False, 2, 1)}  # fmt: skip
"""(guided, context, cfg) of the loops that bench_scaling.py times."""


IN_8_BITS = {"fp8_one": (True, 1, 1), "fp8_context2": (True, 2, 1)}


def steps_of(record: dict[str, Any], named: dict[str, tuple[bool, int, int]] = LOOPS) -> Times:
    """Measured steps of a record of bench_scaling.py."""
    loops = record.get("loops", {})
    return {key: loops[name]["step_s"] for name, key in named.items() if "step_s" in loops.get(name, {})}


def clips_of(record: dict[str, Any]) -> Times:
    """Measured clips end to end."""
    clips, keys = record.get("distilled", {}), {"one": (False, 1, 1), "context2": (False, 2, 1)}
    return {key: clips[name]["seconds"] for name, key in keys.items() if "seconds" in clips.get(name, {})}


Found = tuple[Path, dict[str, Any]]


def newest(folder: Path) -> tuple[Found | None, Found | None]:
    """Of one GPU kind the newest record with the rates, if there is one from several GPUs that; and the newest of those."""
    rated, several = [], []
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("args", {}).get("smoke") == "True":
            continue
        date, is_several = str(record.get("environment", {}).get("date")), record.get("kind") == "scaling"
        if rates_of(record) is not None:
            rated.append((is_several, date, path, record))
        if is_several:
            several.append((date, path, record))
    first = max(rated, key=lambda item: item[:2])[2:] if rated else None
    second = max(several, key=lambda item: item[0])[1:] if several else None
    return first, second


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path, nargs="?")
    parser.add_argument("--link", type=float, help="GB/s a GPU sends within its host, one direction")
    parser.add_argument("--network", type=float, help="GB/s a GPU sends to other hosts")
    parser.add_argument(
        "--recipe", choices=("exact", "fp8"), default="exact", help="fp8: predicted, not measured"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per layout instead of tables")
    args = parser.parse_args(argv)
    chosen: list[tuple[Found | None, Found | None]]
    if args.record:
        found = args.record, json.loads(args.record.read_text(encoding="utf-8"))
        chosen = [(found, found)]
    else:
        chosen = [newest(folder) for folder in sorted(p for p in RESULTS.iterdir() if p.is_dir())]
    every = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*/*.json")))
    ratios = ratios_of(every) if args.recipe == "fp8" else {}
    if ratios is None:
        print(f"scaling: --recipe fp8: needs a record of bench_fp8.py that traced exact and fp8, got none in {RESULTS}.", file=sys.stderr)  # fmt: skip
        return 2
    for rated, several in chosen:
        seen: dict[str, Any] = several[1] if several else {}
        link = args.link or link_of(seen)
        rates = rates_of(rated[1], link, args.network) if rated else None
        if rates is None or rated is None:
            if args.record:
                print(
                    f"scaling: {args.record}: must have the trace and the time of one step, got neither.",
                    file=sys.stderr,
                )
                return 2
            continue
        steps, clips = steps_of(seen), clips_of(seen)
        if args.recipe == "fp8":  # the records' clips are of exact
            rates, steps, clips = rates.in_8_bits(ratios), steps_of(seen, IN_8_BITS), {}
        for guided in (True, False):
            if args.json:
                for context, cfg in LAYOUTS:
                    if guided or cfg == 1:
                        key, one = (guided, context, cfg), step(context, cfg, rates, guided=guided)
                        row = (
                            {"guided": guided, "context": context, "cfg": cfg}
                            | asdict(one)
                            | {"total_s": one.total_s}
                        )
                        print(
                            json.dumps(
                                row | {"measured_s": steps.get(key), "measured_clip_s": clips.get(key)}
                            )
                        )
            else:
                what = "base, two passes a step" if guided else "distilled, one pass a step"
                what += ", recipe fp8 by ratios" if args.recipe == "fp8" else ""
                said = "given" if args.link else "measured" if link else "assumed"
                source = f"link {said}, network {'given' if args.network else 'assumed'}"
                print(
                    f"{rated[0].name}: {what}; {rates.link:.0f} GB/s in a host, {rates.network:.0f} beyond ({source})"
                )
                print(table(rates, steps, clips, guided=guided) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
