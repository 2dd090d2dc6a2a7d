"""Train the embedded model, one stage per command or all in a row.

    python tools/train/train.py --stage all --minutes vae=4.5,latents=0.5,base=5,control=3,distill=2 \\
        --data CLIPS --out OUT

Stages: vae, latents, base, control, distill, export. A stage that was interrupted goes on where it was; with
more minutes a finished one goes on too. OUT/keep is all that is worth carrying away (averaged weights, logs,
pictures); put it back as OUT/keep to go on elsewhere. OUT/model is what Engine loads.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

import base_stage  # noqa: E402
import clips  # noqa: E402
import control_stage  # noqa: E402
import distill_stage  # noqa: E402
import export  # noqa: E402
import latents_stage  # noqa: E402
import torch  # noqa: E402
import vae_stage  # noqa: E402
from recording import Run, record  # noqa: E402
from sizes import Sizes  # noqa: E402

from cosmos_fast.formats import CONTROLS  # noqa: E402

STAGES = ("vae", "latents", "base", "control", "distill", "export")


def prepare() -> None:
    """Settings of the whole process: the command's business, as they would change whatever else runs in it."""
    torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)  # fresh branches make tiny gradients, and denormals are slow on a CPU
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 3  # trying all algorithms of all 3-D convs takes most of a minute
    torch._dynamo.config.recompile_limit = 64


def run_stages(run: Run, stages: list[str], minutes: dict[str, float], limit: int | None = None) -> None:
    loaded: clips.Clips | None = None
    latents: latents_stage.Latents | None = None
    for stage in stages:
        began = time.monotonic()
        own = replace(run, minutes=minutes.get(stage))
        if stage in ("vae", "latents"):
            loaded = loaded or clips.load(run.data, run.device, limit, run.seed)
            if stage == "vae":
                vae_stage.train(own, loaded)
            else:
                latents = latents_stage.encode(own, loaded)
                loaded = None
        elif stage == "export":
            export.export(own, run.out / "model")
        else:
            latents = latents or latents_stage.read(own)
            {"base": base_stage, "control": control_stage, "distill": distill_stage}[stage].train(
                own, latents
            )  # type: ignore[attr-defined]
        record(run.keep / "logs" / "stages.jsonl", stage=stage, seconds=round(time.monotonic() - began, 1))


def parse_minutes(text: str, stages: list[str]) -> dict[str, float]:
    """`3` for every stage, or `vae=4,base=5`."""
    if "=" not in text:
        return dict.fromkeys(stages, float(text))
    return {name: float(value) for name, value in (pair.split("=") for pair in text.split(","))}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--stage", default="all", help=f"all, or some of {','.join(STAGES)}, with commas")
    parser.add_argument("--minutes", default=None, help="per stage: one number, or vae=4,base=5,...")
    parser.add_argument(
        "--steps", type=int, help="end each stage after so many steps in all, not by the clock"
    )
    parser.add_argument("--stop", type=int, help="with --steps: stop earlier, as if killed")
    parser.add_argument("--data", type=Path, required=True, help="folder of tools/data/make_dataset.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", choices=("tiny", "toy"), default="tiny")
    parser.add_argument("--batch", type=int, help="samples per step (default: per stage)")
    parser.add_argument(
        "--controls", default=",".join(CONTROLS), help="branches that stage control trains: one, two or all"
    )
    parser.add_argument("--limit", type=int, help="use the first clips only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    args = parser.parse_args(argv)
    stages = list(STAGES) if args.stage == "all" else args.stage.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"--stage: must be among {', '.join(STAGES)}, got {', '.join(unknown)}")
    minutes = parse_minutes(args.minutes, stages) if args.minutes else {}
    if timeless := [
        s for s in stages if s not in ("export", "latents") and s not in minutes and not args.steps
    ]:
        parser.error(
            f"--minutes: must name each stage or --steps be given, got none for {', '.join(timeless)}"
        )
    controls = tuple(name for name in CONTROLS if name in args.controls.split(","))
    if len(controls) not in (1, 2, 4) or len(controls) != len(args.controls.split(",")):
        parser.error(f"--controls: must be one, two or all of {', '.join(CONTROLS)}, got {args.controls}")
    run = Run(
        args.out, args.data, Sizes.named(args.sizes), steps=args.steps, stop=args.stop, batch=args.batch,
        controls=controls, seed=args.seed, device=args.device,
        is_compiled=not args.eager and args.device.startswith("cuda"),
    )  # fmt: skip
    run_stages(run, stages, minutes, args.limit)
    return 0


if __name__ == "__main__":
    prepare()
    sys.exit(main())
