"""Two GPUs of one host against one, in one run: link, exchange, sampling loop, what hides what, the distilled clip.

    python tools/bench_scaling.py --out bench/results --deadline-s 280
    python tools/bench_scaling.py --out F.json --rounds 1 --loops one,context2 --deadline-s 200
    python tools/bench_scaling.py --out F.json --only link,loops,trace --steps 4
    python tools/bench_scaling.py --out /tmp/f.json --smoke           the same code on a CPU, tiny sizes, gloo

This process starts two ranks, which rewrite the file after every piece of a section; a section that fails or takes too
long costs itself alone (`scaling_ranks`). Random weights of the published shapes. In the loops one GPU, cfg=2 and context=2
take turns; while one GPU works, the other idles. Tokens are exchanged by copy engines, in collectives2 by NCCL; where the
section "copies" fails, by NCCL always. fp8_one, fp8_context2: recipe fp8. End to end, a clip goes from the request to its frames on the
host, without the video encoder: its control computed and encoded, four steps, decoded.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools"), str(ROOT)]

from trace import trace  # noqa: E402

import published  # noqa: E402
import scaling_clip  # noqa: E402
import scaling_exchange  # noqa: E402
import scaling_networks  # noqa: E402
from published import relative_l2  # noqa: E402
from records import destination, environment  # noqa: E402
from report_scaling import ALONE, LOOPS  # noqa: E402
from scaling_ranks import Parent, Traffic, fault_file, read, write  # noqa: E402
from scaling_summary import links, summary  # noqa: E402
from scaling_trace import overlap, profiled  # noqa: E402
from watch import Sample, Watch, reader  # noqa: E402

from cosmos_fast import dispatch, parallel, sampler, testing  # noqa: E402
from cosmos_fast.config import NetworkConfig  # noqa: E402
from cosmos_fast.formats import EnvironmentProblem  # noqa: E402
from cosmos_fast.parallel import Group, Mesh, Ranks  # noqa: E402
from cosmos_fast.peer_memory import open_copies  # noqa: E402
from cosmos_fast.recipe import Plan  # noqa: E402

LIMITS_S = {"link": 45.0, "copies": 45.0, "loops": 130.0, "trace": 60.0, "exchange": 60.0, "distilled": 130.0}
"""Sections in order of importance, and how long each may take; the first also joins the ranks."""
GRID, SMOKE_GRID = (24, 88, 160), (3, 8, 12)
CLIP_ROUNDS, CALLS = 2, 4


class Bench:
    """One rank of the run. Every rank does the same; rank 0 keeps the record, which the parent has begun."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.ranks, self.started = args, Ranks.from_environment(), time.perf_counter()
        self.record = read(args.out)
        self.device = self.ranks.device("cpu" if args.smoke else "cuda")
        kind = self.device.type
        parallel.join(self.ranks, self.device, timeout_s=150)
        # Collectives: loops of both exchanges take turns, and `by_copies` opens the other.
        plans = (Plan(device=kind, exchange="collectives", **{axis: 2}) for axis in ("cfg", "context"))
        self.cfg, self.context = map(Mesh.open, plans)
        self.world = self.cfg.world
        self.config = NetworkConfig.tiny() if args.smoke else NetworkConfig.single()
        self.grid = SMOKE_GRID if args.smoke else GRID
        self.watch = Watch(reader(self.ranks.local) if kind == "cuda" else lambda: Sample(0.0, 0.0, 0.0))
        self.traffic = Traffic()

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

    def left_s(self) -> float:
        """Until the whole run is ended."""
        return float(self.args.deadline_s - (time.time() - self.record["started"]))

    def save(self) -> None:
        if self.ranks.rank == 0:
            write(self.args.out, self.record)

    # --- networks: one set of weights, three ways to run it ---

    @cached_property
    def given(self) -> published.Inputs:
        return published.inputs(self.config, self.grid, self.device, torch.bfloat16, steps=self.args.steps)

    @cached_property
    def bound(self) -> dict[str, Any]:
        """Both passes of one GPU, of two that take one pass each, of two that share the tokens; see scaling_networks."""
        given, wanted = self.given, self.args.loops.split(",")
        groups = self.cfg.cfg, self.context.context, self.by_copies
        return scaling_networks.bound(wanted, self.config, given, self.device, *groups)

    @cached_property
    def by_copies(self) -> Group | None:
        """The group that shares tokens, its exchange by copies; None unless they were opened, and went well since."""
        if self.record["sections"].get("copies", {}).get("status") not in ("begun", "ok"):
            return None
        group = self.context.context
        try:
            return replace(group, copies=open_copies(group, self.device))
        except EnvironmentProblem as error:  # on both ranks
            self.record["no_copies"] = str(error)
            return None

    def wanted(self) -> list[str]:
        """The loops asked for, but those that cannot be run here."""
        return [name for name in self.args.loops.split(",") if name in self.bound]

    # --- sections ---

    def link(self) -> None:
        """What an all-to-all gets of the link, at the sizes of the exchange, in one direction."""
        self.record["link"] = self._linked(self.context.context) | links(self.device)

    def copies(self) -> None:
        """The same by copies, proven first."""
        if self.by_copies is not None:
            self.record["copies"] = self._linked(self.by_copies)
            self.record["copies"]["hinted"] = self.by_copies.copies.peers.hinted  # type: ignore[union-attr]

    def _linked(self, group: Group) -> dict[str, Any]:
        rows = {}
        sizes = (("small", 1),) if self.args.smoke else (("qkv of half the heads", 124), ("all of them", 248))
        for name, mib in sizes:
            half = mib * 2**20 // 3072
            packed = torch.zeros(2 * half, 3072, dtype=torch.uint8, device=self.device)

            def send(packed: Tensor = packed, half: int = half) -> None:
                group.all_to_all(packed, [half, half], [half, half]).wait()

            first_s = self.timed(send, "first")
            times = [self.timed(lambda: [send() for _ in range(10)], "link") / 10 for _ in range(3)]  # noqa: B023
            rows[name] = {
                "mib_sent": mib,
                "ms": 1e3 * min(times),
                "gb_s": mib * 2**20 / min(times) / 1e9,
                "first_s": first_s,
            }
        best = max(row["gb_s"] for row in rows.values())
        return {"rows": rows, "all_to_all_gb_s": best}

    def loops(self) -> None:
        """The sampling loop through the solver, both passes a step: seconds of a step, and what came out."""
        steps, names = self.args.steps, self.wanted()
        shape = (1, self.config.latent_channels, *self.grid)
        noise = sampler.noise(0, shape).to(self.device)
        z, loops, results = self.given.z[None], self.record["loops"], {}

        def run(name: str) -> None:
            results[name] = sampler.sample(
                self.bound[name], noise, sampler.base_schedule(steps), guidance=3.0
            )

        for name in names:  # the first call compiles kernels and makes the communicator of its group
            sent = self.traffic.sent
            first_s = self.timed(lambda: self.bound[name](z, 0), "first", alone=name not in ALONE)  # noqa: B023
            loops[name] = {
                "steps": steps,
                "runs_s": [],
                "first_step_s": first_s,
                "sent_bytes_per_step": self.traffic.sent - sent,
            }
        for turn in range(self.args.rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                loops[name]["runs_s"].append(self.timed(lambda: run(name), name, alone=name not in ALONE))  # noqa: B023
                loops[name]["step_s"] = median(loops[name]["runs_s"]) / steps
                loops[name]["gpus"] = self.clocks(name)
                self.save()
        pairs = {
            name: (results[name], results[of])
            for name, of in ALONE.items()
            if name in results and of in results
        }
        if pairs:  # on rank 0
            self.record["equal"] = {
                "bitwise": {name: bool(torch.equal(*pair)) for name, pair in pairs.items()},
                "relative_l2": {name: relative_l2(*pair) for name, pair in pairs.items()},
                "finite": all(bool(torch.isfinite(x).all()) for x in results.values()),
            }

    def trace(self) -> None:
        """Of a step of two GPUs, how much of the exchange is hidden; kernels of one pass on one, for tools/scaling.py."""
        z = self.given.z[None]
        found = self.record["overlap"] = {}
        names = [name for name in self.wanted() if name in ALONE]
        for name in names:
            self.bound[name](z, 0)
            self.together()
            found[name] = overlap(profiled(lambda: self.bound[name](z, 0), self.device))  # noqa: B023
            self.save()
        if self.ranks.rank == 0 and "cfg2" in names:
            self.record["trace"] = {"ours": trace(lambda: self.bound["single"](z, 0), self.device).as_dict()}
        self.together()

    def distilled(self) -> None:
        """The four-step model: clips through the Engine on one GPU and on two that share the tokens and the VAE."""
        self.forget()
        smoke, files = self.args.smoke, self.args.files
        self.world.by_first(lambda: scaling_clip.await_files(files, 60), None)
        fields = scaling_clip.fields(files, smoke=smoke)
        found: dict[str, Any] = {}
        engines: dict[str, Any] = {}
        frames: dict[str, Any] = {}

        def run(name: str, steps: int) -> None:
            frames[name] = scaling_clip.frames_of(engines[name], steps, fields)

        shared = self.context if self.by_copies is None else replace(self.context, context=self.by_copies)
        for name, mesh in (("one", Mesh.alone(self.device)), ("context2", shared)):
            if name == "context2" or self.ranks.rank == 0:
                engines[name] = scaling_clip.open_engine(files, mesh, smoke=smoke)
            first_s = self.timed(partial(run, name, 1), "first", alone=name == "one")
            found[name] = {"runs_s": [], "first_s": first_s, "copies": mesh.context.copies is not None}
        self.record["distilled"] = found
        for turn in range(CLIP_ROUNDS):
            again_s = sum(row["runs_s"][-1] for row in found.values()) if turn else 0.0
            if turn and self.world.tell(self.left_s() < 1.2 * again_s + 5):
                break
            for name in list(found) if turn % 2 == 0 else reversed(list(found)):
                row = found[name]
                row["runs_s"].append(self.timed(partial(run, name, 4), f"clip {name}", alone=name == "one"))
                row |= {"seconds": median(row["runs_s"]), "gpus": self.clocks(f"clip {name}")}
                if name in engines:
                    row |= scaling_clip.stages_of(engines[name])
                    self.record["loops"][f"distilled_{name}"] = {
                        "steps": 4,
                        "step_s": row["stages"]["denoise"] / 4,
                    }
                self.save()
        if "one" in engines:
            self.record["distilled_codes_off"] = scaling_clip.difference(frames["context2"], frames["one"])

    def exchange(self) -> None:
        """One self-attention of a block, its tokens spread: equality with one GPU, and milliseconds by parts and formats."""
        qkv, table = scaling_exchange.operands(self.config, self.grid, self.device)
        rows = self.record["exchange"] = {}
        for name, call, wanted in scaling_exchange.calls(qkv, table, self.context.context, self.by_copies):
            try:
                rows[name] = scaling_exchange.equality(call, wanted, qkv.shape[0], self.context.context)
                again = partial(lambda call: [call() for _ in range(CALLS)], call)
                rows[name]["ms"] = 1e3 * median(self.timed(again, "exchange") / CALLS for _ in range(3))
            except (RuntimeError, EnvironmentProblem) as error:  # of an operand, so the same on both ranks
                rows[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            self.save()

    # --- running them ---

    def forget(self) -> None:
        """Networks and inputs of the sections before: the next one needs the memory."""
        for name in ("bound", "given"):
            self.__dict__.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def section(self, name: str) -> None:
        start = time.perf_counter()
        entry = self.record["sections"][name] = {"status": "begun"}
        self.save()
        with torch.no_grad():
            getattr(self, name)()
        self.together()
        entry |= {"status": "ok", "seconds": time.perf_counter() - start}
        self.record["kernels"] = dispatch.used()
        self.save()
        if self.ranks.rank == 0:
            at = time.perf_counter() - self.started
            print(f"[{at:6.1f} s] {name}\n{summary(self.record, name)}", flush=True)


def rank(args: argparse.Namespace, wanted: list[str]) -> int:
    """What one of the two processes does. It ends at once where a section fails: the other cannot be called back."""
    me = int(os.environ["RANK"])
    try:
        testing.kernels_from_checkout()
        b = Bench(args)
        b.record["ops"] = [
            {"op": op, "chosen": name} for op, name, _ in dispatch.explain(b.device, torch.bfloat16)
        ]
        for name in wanted:
            b.section(name)
        b.watch.close()
        b.together()
        b.cfg.close()
    except Exception as error:
        traceback.print_exc()
        fault_file(args.out, me).write_text(
            f"rank {me}: {type(error).__name__}: {error}"[:2000], encoding="utf-8"
        )
        sys.stderr.flush()
        os._exit(1)
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a .json file, or the folder bench/results")
    parser.add_argument(
        "--only", default=",".join(LIMITS_S), help=f"comma-separated sections of {', '.join(LIMITS_S)}"
    )
    parser.add_argument("--steps", type=int, default=2, help="steps of a sampling loop")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--loops", default=",".join(LOOPS), help=f"comma-separated loops of {', '.join(LOOPS)}"
    )
    parser.add_argument("--deadline-s", type=float, default=230)
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    parser.add_argument(
        "--files", type=Path, help="folder of the clip's files, made by scaling_clip.py; default: made"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: checks this script")
    args = parser.parse_args(arguments)
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(LIMITS_S):
        parser.error(f"--only: sections are {', '.join(LIMITS_S)}, got {', '.join(sorted(unknown))}")
    if "RANK" in os.environ:
        if args.files is None:
            parser.error("must be started alone, not by torchrun: it starts its two ranks itself")
        return rank(args, wanted)
    until = time.monotonic() + args.deadline_s
    record: dict[str, Any] = {
        "kind": "scaling", "environment": environment(args.commit),
        "args": {k: str(v) for k, v in vars(args).items() if k not in ("out", "files")}, "sections": {}, "loops": {}, "started": time.time(),
    }  # fmt: skip
    out = destination(args.out, record["environment"], "scaling")
    write(out, record)
    with tempfile.TemporaryDirectory(prefix="scaling-", ignore_cleanup_errors=True) as folder:
        files, making = args.files or Path(folder), None
        if "distilled" in wanted and args.files is None:  # beside the sections before it, on one core
            script = [sys.executable, str(ROOT / "tools" / "scaling_clip.py"), folder]
            quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            making = subprocess.Popen([*script, *(["--smoke"] if args.smoke else [])], env=os.environ | quiet)
        try:
            kept = [*arguments, "--out", str(out), "--files", str(files)]
            code = Parent([__file__, *kept], out, {name: LIMITS_S[name] for name in wanted}, until).run()
        finally:
            if making is not None:
                making.kill()
                making.wait()
    print(f"written: {out}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
