"""Two GPUs of one host against one, in one run: the sampling loop, the distilled clip end to end, and what hides what.

    python tools/bench_scaling.py --out bench/results --deadline-s 230
    python tools/bench_scaling.py --out F.json --only link,loops,trace --steps 4
    python tools/bench_scaling.py --out /tmp/f.json --smoke           the same code on a CPU, tiny sizes, gloo

This process starts two ranks and ends them at the deadline, whatever they do; rank 0 rewrites the file after every
section. Random weights of the published shapes. In the loops one GPU, cfg=2 and context=2 take turns; while one GPU
works, the other idles. A clip end to end goes from the request to its frames on the host, without the video encoder.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools"), str(ROOT)]

from trace import trace  # noqa: E402

import published  # noqa: E402
from published import relative_l2  # noqa: E402
from records import attempted, destination, environment, skipped  # noqa: E402
from report_scaling import gains  # noqa: E402
from scaling_ranks import Traffic, parent, reader  # noqa: E402
from scaling_trace import overlap, profiled  # noqa: E402
from watch import Watch  # noqa: E402

from cosmos_fast import dispatch, parallel, sampler, testing  # noqa: E402
from cosmos_fast.config import NetworkConfig  # noqa: E402
from cosmos_fast.exchange import Exchanged  # noqa: E402
from cosmos_fast.network import Network, Single  # noqa: E402
from cosmos_fast.parallel import Halves, Mesh, Ranks  # noqa: E402
from cosmos_fast.recipe import Plan  # noqa: E402

SECTIONS = ("link", "loops", "trace", "distilled")
GOALS = {"cfg2": 1.92, "context2": 1.90, "distilled2": 1.85}
GRID, SMOKE_GRID = (24, 88, 160), (3, 8, 12)
PROMPT = "A busy street in warm evening light, photorealistic."


class Bench:
    """One rank of the run. Every rank does the same; rank 0 keeps the record."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.ranks, self.started = args, Ranks.from_environment(), time.perf_counter()
        self.device = self.ranks.device("cpu" if args.smoke else "cuda")
        kind = self.device.type
        parallel.join(self.ranks, self.device, timeout_s=120)
        self.cfg, self.context = (Mesh.open(Plan(device=kind, **{axis: 2})) for axis in ("cfg", "context"))
        self.world = self.cfg.world
        self.config = NetworkConfig.tiny() if args.smoke else NetworkConfig.single()
        self.grid = SMOKE_GRID if args.smoke else GRID
        self.watch = Watch(reader(self.ranks.local) if kind == "cuda" else None)
        self.traffic = Traffic()
        self.record: dict[str, Any] = {
            "kind": "scaling", "environment": environment(args.commit),
            "args": {k: str(v) for k, v in vars(args).items() if k != "out"}, "sections": {}, "loops": {},
        }  # fmt: skip

    # --- time ---

    def sync(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def together(self) -> float:
        """Now, with every device idle and every rank here."""
        self.sync()
        self.world.hear(None)
        return self.sync()

    def timed(self, call: Callable[[], object], label: str, *, alone: bool = False) -> float:
        """Seconds until all ranks are done. alone: only rank 0 works."""
        start = self.together()
        with self.watch(label):
            if not alone or self.ranks.rank == 0:
                call()
            end = self.together()
        return end - start

    def clocks(self, label: str) -> list[Any]:
        """Clock, power and temperature of every GPU while `label` ran."""
        return self.world.hear(self.watch.summary(label))

    # --- networks: one set of weights, three ways to run it ---

    def bound(self, config: NetworkConfig) -> dict[str, Network]:
        """The network of one GPU and the one of two that share tokens, on the same weights."""
        with torch.no_grad():
            alone = published.build(
                config, published.random_state(config, 0, self.device), self.device, torch.bfloat16
            )
        with torch.device("meta"):
            shared = Network(config, Exchanged(self.context.context), self.context.context)
        shared.load_state_dict(alone.state_dict(), strict=True, assign=True)
        return {"one": alone, "shared": shared.eval().requires_grad_(False)}

    def pairs(self, given: published.Inputs) -> dict[str, Any]:
        networks = self.bound(self.config)
        self.single, pair = published.bind(networks["one"], given)
        contexts = (pair.cond, pair.uncond)
        halves = Halves(Single(networks["one"], contexts[self.cfg.cfg.rank]), self.cfg.cfg)
        return {"one": pair, "cfg2": halves, "context2": published.bind(networks["shared"], given)[1]}

    # --- sections ---

    def link(self) -> None:
        """What an all-to-all gets of the link, at the sizes of the exchange, in one direction."""
        rows = {}
        for name, mib in (
            (("qkv of half the heads", 124), ("all of them", 248)) if not self.args.smoke else (("small", 1),)
        ):
            half = mib * 2**20 // 3072
            packed = torch.zeros(2 * half, 3072, dtype=torch.uint8, device=self.device)

            def send(packed: Tensor = packed, half: int = half) -> None:
                self.context.context.all_to_all(packed, [half, half], [half, half]).wait()

            send()
            times = [self.timed(lambda: [send() for _ in range(10)], "link") / 10 for _ in range(3)]
            rows[name] = {"mib_sent": mib, "ms": 1e3 * min(times), "gb_s": mib * 2**20 / min(times) / 1e9}
        best = max(row["gb_s"] for row in rows.values())
        self.record["link"] = {"rows": rows, "all_to_all_gb_s": best}

    def loops(self) -> None:
        """The sampling loop through the solver, both passes a step: seconds of a step, and what came out."""
        steps = self.args.steps
        given = published.inputs(self.config, self.grid, self.device, torch.bfloat16, steps=steps)
        pairs = self.pairs(given)
        noise = sampler.noise(0, (1, self.config.latent_channels, *self.grid)).to(self.device)
        results: dict[str, Tensor] = {}

        def run(name: str) -> None:
            results[name] = sampler.sample(pairs[name], noise, sampler.base_schedule(steps), guidance=3.0)

        self.turns(pairs, run, lambda name: pairs[name](given.z[None], 0), given)
        self.compare(results)

    def turns(
        self, calls: dict[str, Any], run: Any, warm: Any, given: published.Inputs, prefix: str = ""
    ) -> None:
        """Warm up each variant, then let them take turns."""
        names = list(calls)
        first = {name: self.timed(lambda: warm(name), "first", alone=name == "one") for name in names}  # noqa: B023
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(self.args.rounds):
            for name in names:
                times[name].append(self.timed(lambda: run(name), f"{prefix}{name}", alone=name == "one"))  # noqa: B023
        steps = len(given.times)
        for name in names:
            sent = 0 if name == "one" else self.traffic.of(lambda: warm(name))  # noqa: B023
            self.record["loops"][prefix + name] = {
                "steps": steps, "runs_s": times[name], "step_s": median(times[name]) / steps, "first_step_s": first[name],
                "sent_bytes_per_step": sent, "gpus": self.clocks(f"{prefix}{name}"),
            }  # fmt: skip

    def compare(self, results: dict[str, Tensor]) -> None:
        one = results.get("one")
        errors = {} if one is None else {n: relative_l2(x, one) for n, x in results.items() if n != "one"}
        same = {} if one is None else {n: bool(torch.equal(x, one)) for n, x in results.items() if n != "one"}
        self.record["equal"] = {
            "bitwise": same,
            "relative_l2": errors,
            "finite": one is not None and bool(torch.isfinite(one).all()),
        }

    def trace(self) -> None:
        """Kernels of one pass on one GPU, for tools/scaling.py; and of a step of two, how much of the exchange is hidden."""
        given = published.inputs(self.config, self.grid, self.device, torch.bfloat16)
        pairs = self.pairs(given)
        z = given.z[None]
        if self.ranks.rank == 0:
            self.record["trace"] = {"ours": trace(lambda: self.single(z, 0), self.device).as_dict()}
        self.together()
        self.record["overlap"] = {}
        for name in ("cfg2", "context2"):
            pairs[name](z, 0)
            self.together()
            self.record["overlap"][name] = overlap(profiled(lambda: pairs[name](z, 0), self.device))  # noqa: B023

    def distilled(self) -> None:
        """The four-step model: clips through the Engine on one GPU and on two that share the tokens and the VAE."""
        from cosmos_fast.engine import Engine

        smoke = self.args.smoke
        root = Path(self.world.first(lambda: str(self._files())))
        lengths = {"chunk_lengths": (5, 1)} if smoke else {}
        fields = {"prompt": PROMPT, "video_path": str(root / "street.mp4"), "edge": {}, "num_video_frames_per_chunk": 5 if smoke else 93,
                  "resolution": "256" if smoke else "720"}  # fmt: skip
        found: dict[str, Any] = {}
        for name, mesh in (("one", None), ("context2", self.context)):
            engine = None
            if mesh is not None or self.ranks.rank == 0:
                plan = Plan(device=self.device.type, context=2 if mesh else 1)
                engine = Engine(
                    root / "models", model="edge/distilled", text=root / "text.safetensors", plan=plan, guardrails=False,
                    mesh=mesh or Mesh.alone(self.device), **lengths,
                )  # fmt: skip

            first_s = self.timed(partial(_clip, engine, 1, fields), "first", alone=mesh is None)
            seconds = self.timed(partial(_clip, engine, 4, fields), f"distilled {name}", alone=mesh is None)
            stages = (
                {}
                if engine is None
                else {k: v["seconds"] for k, v in engine.stages.record().items() if k != "load"}
            )
            peaks = {} if engine is None else {k: v["peak_bytes"] for k, v in engine.stages.record().items()}
            found[name] = {"seconds": seconds, "first_s": first_s, "stages": stages, "peak_bytes": peaks,
                           "gpus": self.clocks(f"distilled {name}")}  # fmt: skip
            if "denoise" in stages:
                self.record["loops"][f"distilled_{name}"] = {"steps": 4, "step_s": stages["denoise"] / 4}
            self.record["distilled"] = found
            del engine  # the next one needs the memory
            self.clear()
        if self.ranks.rank == 0:
            shutil.rmtree(root, ignore_errors=True)

    def _files(self) -> Path:
        """Random weights and embeddings of the published shapes, and a moving picture."""
        import make_checkpoint
        import numpy as np

        from cosmos_fast.text import write_embeddings
        from cosmos_fast.video import Writer

        root, size = Path(tempfile.mkdtemp(prefix="scaling-")), "tiny" if self.args.smoke else "2b"
        device = {"device": "cpu"} if self.args.smoke else {}
        make_checkpoint.make(root / "models", "distilled", size, with_vae=True, **device)
        config = make_checkpoint.config_of("distilled", size)
        embedded = torch.randn(
            config.text_tokens, config.text_width, generator=torch.Generator().manual_seed(0)
        )
        write_embeddings(root / "text.safetensors", {PROMPT: embedded.bfloat16()})
        frames, width, height = (5, 256, 256) if self.args.smoke else (93, 1280, 704)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        with Writer(root / "street.mp4", (width, height), 16) as writer:
            for i in range(frames):
                wave = np.sin((x + 9 * i) / 37) * np.cos((y - 5 * i) / 53)
                writer.write(
                    np.stack([127 + 120 * wave, 127 - 90 * wave, (x + 3 * i) % 256], -1).astype(np.uint8)
                )
        return root

    # --- running them ---

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def section(self, name: str, run: Callable[[], None]) -> None:
        deadline = self.args.deadline_s - 30
        late = self.world.tell(time.perf_counter() - self.started > deadline)
        self.record["sections"][name] = entry = skipped(deadline) if late else attempted(run)
        self.clear()
        if self.ranks.rank == 0:
            self.args.out.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
            print(
                f"[{time.perf_counter() - self.started:6.1f} s] {name}: {entry['status']}\n{summary(self.record, name)}",
                flush=True,
            )


def _clip(engine: Any, steps: int, fields: dict[str, Any]) -> None:
    """One clip, its frames on the host."""
    from cosmos_fast.spec import Spec

    for _ in engine.stream(Spec(name="clip", num_steps=steps, **fields)):
        pass


def summary(record: dict[str, Any], section: str) -> str:
    lines = []
    if section == "link" and "link" in record:
        lines += [
            f"  {name}: {row['ms']:.3f} ms, {row['gb_s']:.0f} GB/s"
            for name, row in record["link"]["rows"].items()
        ]
    if section in ("loops", "distilled"):
        for name, row in record["loops"].items():
            mhz = [gpu.get("sm_mhz", {}).get("median", 0) for gpu in row.get("gpus", [])]
            lines.append(
                f"  {name:<20} {row['step_s']:8.4f} s/step, sent {row.get('sent_bytes_per_step', 0) / 1e9:.2f} GB, MHz {mhz}"
            )
        lines.append(f"  equal {record.get('equal')}")
    if section == "trace":
        lines += [f"  {name}: {row}" for name, row in record.get("overlap", {}).items()]
    if section == "distilled":
        lines += [
            f"  {name}: {row['seconds']:.2f} s {row['stages']}"
            for name, row in record.get("distilled", {}).items()
        ]
    lines += [f"  {name} {gain:.3f} x, goal {GOALS[name]}" for name, gain in gains(record).items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a .json file, or the folder bench/results")
    parser.add_argument("--only", help=f"comma-separated sections of {', '.join(SECTIONS)}")
    parser.add_argument("--steps", type=int, default=2, help="steps of a sampling loop")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--deadline-s", type=float, default=230)
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: checks this script")
    args = parser.parse_args(arguments)
    wanted = args.only.split(",") if args.only else list(SECTIONS)
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only: sections are {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    if Ranks.from_environment().size == 1:
        return parent([__file__, *arguments], args.deadline_s)
    testing.kernels_from_checkout()
    b = Bench(args)
    b.args.out = destination(args.out, b.record["environment"], "scaling")
    b.record["ops"] = [
        {"op": op, "chosen": name} for op, name, _ in dispatch.explain(b.device, torch.bfloat16)
    ]
    for name in wanted:
        b.section(name, getattr(b, name))
    b.watch.close()
    b.together()
    failed = any(s["status"] != "ok" for s in b.record["sections"].values())
    if b.ranks.rank == 0:
        print(f"written: {b.args.out}\n{json.dumps(gains(b.record))}", flush=True)
    b.cfg.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
